"""What the server nodes do, on SGLang's own HTTP app: verified before, said in full, checked after; and every failure as a sentence
that says what to do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import comfy.model_management
import pytest
import torch

from quantized_transformers import host
from quantized_transformers.engines.sglang import client, jobs, report, results
from quantized_transformers.engines.sglang.address import address_of
from quantized_transformers.engines.sglang.loras import LoRA
from quantized_transformers.engines.sglang.requests import Drawing
from quantized_transformers.engines.sglang.wanted import Server, wanted
from quantized_transformers.loaders.errors import CheckpointError
from support import sglang
from support.pack import PACK
from support.sglang_stub import Stub

pytestmark = pytest.mark.server
NAME = "qt:somebody/base@0123456789ab"
CAT = Drawing("a cat", width=64, height=48, steps=4, seed=7)
FILM = Drawing("a cat", width=64, height=48, steps=4, seed=7, frames=5, fps=8)
EDITS, T2V, I2V = "Qwen-Image-Edit-2511", "Wan2.1-T2V-1.3B-Diffusers", "Wan2.2-I2V-A14B-Diffusers"
SEVEN = torch.tensor([(40 + 37 * 7) % 200, (80 + 59 * 7) % 200, (120 + 83 * 7) % 200]) / 255


@pytest.fixture
def server(stub: Stub) -> Server:
    stub.restart(name=NAME)
    return wanted(f"http://127.0.0.1:{stub.port}", "somebody/base")


def draw(*given, **more):
    return asyncio.run(jobs.draw(*given, **more))


def film(*given, **more):
    return asyncio.run(jobs.film(*given, **more))


def refused(word: str, call, *given, **more) -> str:
    with pytest.raises(CheckpointError, match=word) as found:
        call(*given, **more)
    return str(found.value)


def colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2))


def test_a_picture_as_it_was_asked_for(stub, server):
    images, report = draw(server, CAT)
    assert images.shape == (1, 48, 64, 3) and torch.allclose(colours(images)[0], SEVEN, atol=1 / 255)
    asked, = stub.drawn
    assert (asked["prompt"], asked["seed"], asked["width"], asked["height"], asked["num_inference_steps"]) == ("a cat", 7, 64, 48, 4)
    assert asked["generator_device"] == "cpu" and asked["output_file_name"].endswith(".png") and not asked["cfg"]
    assert NAME in report and "SGLang 0.5.23" in report and "seed 7" in report
    kinds = [one["path"] for one in stub.requests]
    assert kinds == ["/health", "/health", "/v1/models", "/server_info", "/v1/list_loras", "/v1/images/generations", "/v1/list_loras"]


def test_many_are_as_many_requests(stub, server):
    images, _ = draw(server, CAT, count=3)
    assert [one["seed"] for one in stub.drawn] == [7, 8, 9] and {one["num_outputs_per_prompt"] for one in stub.drawn} == {1}
    alone, _ = draw(server, Drawing("a cat", width=64, height=48, steps=4, seed=9))
    assert torch.equal(images[2], alone[0])
    draw(server, Drawing("a cat", width=64, height=48, steps=4, seed=2 ** 64 - 1), count=2)
    assert [one["seed"] for one in stub.drawn][-2:] == [2 ** 64 - 1, 0]


@pytest.mark.parametrize("count", [1, 3])
def test_an_edit_of_all_its_pictures_in_order(stub, server, count):
    stub.restart(name=NAME, model=EDITS)
    given = torch.stack([torch.full((24, 32, 3), (10 + 80 * number) / 255) for number in range(count)])
    images, _ = draw(server, CAT, images=given)
    asked, = stub.drawn
    assert [one["mean"] for one in asked["images"]] == [[10 + 80.0 * number] * 3 for number in range(count)]
    assert asked["negative_prompt"] == " " and asked["seed"] == 7 and images.shape == (1, 48, 64, 3)
    assert (asked["width"], asked["height"], asked["generator_device"]) == (64, 48, "cpu")
    sent = next(one for one in stub.requests if one["path"] == "/v1/images/edits")["parts"]
    assert [part["name"] for part in sent if "data" in part] == [("image" if count == 1 else "image[]")] * count


def test_what_a_server_is_not_for(stub, server):
    assert "T2I" in refused("this server does T2I, and this needs I2I or TI2I", draw, server, CAT, images=torch.zeros(1, 8, 8, 3))
    refused("this needs T2V or TI2V", film, server, FILM)
    stub.restart(name=NAME, model=T2V)
    refused("this server does T2V, and this needs T2I or TI2I", draw, server, CAT)
    assert not stub.drawn


def test_another_model_is_refused_before_anything_is_drawn(stub, server):
    text = refused("the server serves qt:somebody/base@0123456789ab, and wanted is qt:somebody/base.transformer=somebody/other", draw,
                   wanted(server.server, "somebody/base", "somebody/other"), CAT)
    assert "serve somebody/base --override somebody/other" in text and server.server in text
    stub.restart(name="FLUX.1-dev")
    refused("cannot be verified", draw, server, CAT)
    assert not stub.drawn
    draw(wanted(server.server, "somebody/base", check="none"), CAT)
    assert len(stub.drawn) == 1


@pytest.mark.parametrize("plan, word", [
    ({"size": [32, 48]}, "drew 32 x 48, and 64 x 48 was asked for"), ({"count": 2}, "sent 2 pictures for one"),
    ({"error": "out of memory"}, r"failed on this request \(500\)")])
def test_a_picture_that_is_not_what_was_asked_for(stub, server, plan, word):
    stub.next(plan)
    text = refused(word, draw, server, CAT)
    assert "what to do" in text and server.server in text
    assert ("seed 7" in text) == ("error" in plan)


def test_a_size_that_the_model_rounds(stub, server):
    """As the real ones do, in silence."""
    stub.next({"size": [96, 96]})
    assert "ask for 96 x 96" in refused("drew 96 x 96, and 100 x 100", draw, server, Drawing("a", width=100, height=100, steps=1))
    stub.next({"size": [96, 96]})
    images, _ = draw(server, Drawing("a", width=100, height=100, steps=1, extra='{"accept_size": true}'))
    assert images.shape == (1, 96, 96, 3)


def test_what_the_server_refuses_it_says_itself(stub, server):
    assert "quality must be one of" in refused("the server refuses this", draw, server, Drawing("a", width=64, height=48, quality="x"))
    assert "max_sequence_length" in refused("the server refuses this", draw, server,
                                            Drawing("a", width=64, height=48, extra='{"max_sequence_length": "many"}'))


def test_a_server_that_warms_up_is_waited_for(stub, server):
    stub.restart(name=NAME, warm=False)
    refused("took longer than 1 s: it is still warming up", draw, server, CAT, timeout=1)

    async def both():
        waiting = asyncio.create_task(jobs.draw(server, CAT))
        await asyncio.sleep(1.5)
        assert not waiting.done()
        await asyncio.to_thread(stub.told, warm=True)
        return await waiting

    images, _ = asyncio.run(both())
    assert images.shape == (1, 48, 64, 3)


def test_dead_workers(stub, server):
    stub.told(kill=True)
    stub.until(lambda: stub.request("/health")[0] == 503)
    assert "restart it" in refused("its workers died", draw, server, CAT)


def test_workers_that_die_while_they_draw(stub, server):
    async def both():
        stub.next({"hold": True})
        waiting = asyncio.create_task(jobs.draw(server, CAT))
        while not await asyncio.to_thread(lambda: stub.drawn):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(stub.told, kill=True)
        await waiting

    with pytest.raises(CheckpointError, match="its workers died"):
        asyncio.run(both())


def test_nobody_there():
    text = refused("there is no server", draw, wanted(f"http://127.0.0.1:{sglang.free_ports(1)}", "somebody/base"), CAT)
    assert "serve BASE --override REF --run" in text and "QT_SERVER_URL" in text


def test_a_page_that_is_no_server(tmp_path):
    port = sglang.free_ports(1)
    page = subprocess.Popen([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                refused("it answers 404 to /health", draw, wanted(f"http://127.0.0.1:{port}", "somebody/base"), CAT)
                break
            except AssertionError:
                time.sleep(0.1)  # not up yet
        else:
            pytest.fail("no answer")
    finally:
        page.terminate()
        page.wait()


def test_a_token_is_sent_and_not_said(stub, server, monkeypatch):
    monkeypatch.setenv("QT_SERVER_TOKEN", "hush-hush")
    _, report = draw(server, CAT)
    assert {one["headers"].get("authorization") for one in stub.requests} == {"Bearer hush-hush"}
    stub.next({"error": "x"})
    assert "hush" not in report + refused("failed", draw, server, CAT) + str(server.to_json())


A, B = LoRA("owner/a", 0.5), LoRA("/srv/b.safetensors", -0.25)


def test_loras_are_put_on_and_taken_off(stub, server):
    plain, _ = draw(server, CAT)
    stub.told(clear=True)
    both, report = draw(server.with_lora(A).with_lora(B), CAT)
    again, _ = draw(server.with_lora(A).with_lora(B), CAT)
    assert "owner/a x 0.5" in report and not torch.equal(both, plain) and torch.equal(both, again)
    assert [one["asked"] for one in stub.seen] == ["SetLoraReq", "Req", "Req"], "what is on stays on"
    off, _ = draw(server, CAT)
    assert torch.equal(off, plain) and [one["asked"] for one in stub.seen][3:] == ["UnmergeLoraWeightsReq", "Req"]
    zero, _ = draw(server.with_lora(LoRA("owner/a", 0.0)), CAT)
    assert torch.equal(zero, plain)


def test_a_lora_of_somebody_else_is_taken_off(stub, server):
    stub.request("/v1/set_lora", {"lora_nickname": "x", "lora_path": "/x", "strength": 1.0})
    draw(server, CAT)
    assert not stub.drawn[0]["loras"]


def test_a_target_that_the_model_has_not(stub, server):
    text = refused("said yes to the LoRAs, and transformer_2 has none on", draw, server.with_lora(LoRA("a/b", target="transformer_2")), CAT)
    assert "the target or the path is wrong" in text and not stub.drawn


def test_a_server_that_says_yes_and_does_nothing(stub, server):
    stub.next_loras({"nothing": True})
    refused("said yes to the LoRAs, and transformer has none on", draw, server.with_lora(A), CAT)
    draw(server.with_lora(A), CAT)
    stub.next_loras({"nothing": True})
    refused("said yes to the LoRAs, and transformer has qt-", draw, server, CAT)
    assert len(stub.drawn) == 1


def test_a_lora_that_the_server_cannot_load(stub, server):
    stub.next_loras({"error": "Weight path does not exist"})
    assert "a path on the server's machine" in refused("Weight path does not exist", draw, server.with_lora(A), CAT)


@pytest.mark.parametrize("theirs", [[{"lora_nickname": "x", "lora_path": "/x"}], []])
def test_loras_that_another_client_changes_meanwhile(stub, server, theirs):
    stub.next({"loras": theirs})
    refused("another client changed the LoRAs while this was drawn", draw, server.with_lora(A), CAT)
    stub.next({"loras": [{"lora_nickname": "x", "lora_path": "/x"}]})
    refused("another client changed the LoRAs while this was drawn", draw, server, CAT)


def test_both_transformers_of_wan_have_their_own(stub, server):
    stub.restart(name=NAME, model="Wan2.2-T2V-A14B-Diffusers")
    film(server.with_lora(A).with_lora(LoRA("high", target="transformer")).with_lora(LoRA("low", 0.3, "transformer_2")), FILM)
    on = {role: active[0]["path"] for role, active in stub.drawn[0]["loras"].items()}
    assert on == {"transformer": "owner/a,high", "transformer_2": "owner/a,low"}


def test_what_a_server_was_started_with_is_what_it_draws_with(stub, server):
    stub.restart(name=f"{NAME}+lora=style@0123456789ab*0.8")
    start = {"lora_nickname": "qt-0123456789ab", "lora_path": "/srv/style.safetensors", "strength": 0.8}
    stub.request("/v1/set_lora", start)
    draw(server, CAT)
    draw(server.with_lora(A), CAT)
    draw(server, CAT)
    names = [one["loras"]["transformer"][0]["nicknames"] for one in stub.drawn]
    assert names == [["qt-0123456789ab"], [A.name], ["qt-0123456789ab"]]


@pytest.fixture
def cancel():
    yield lambda: comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("kind", ["picture", "video", "lossless"])
def test_cancel_is_heard_at_once_and_the_next_one_is_right(stub, server, cancel, kind, monkeypatch):
    if kind != "picture":
        stub.restart(name=NAME, model=T2V)
    said: list[str] = []
    monkeypatch.setattr(host.Waiting, "say", lambda self, words: said.append(words))
    if kind == "lossless":
        from pip._vendor import msgpack

        monkeypatch.setitem(sys.modules, "msgpack", msgpack)
    run = {"picture": lambda: jobs.draw(server, CAT), "video": lambda: jobs.film(server, FILM),
           "lossless": lambda: jobs.film(server, FILM, transport="lossless")}[kind]

    async def both() -> float:
        stub.next({"hold": True})
        waiting = asyncio.create_task(run())
        while not await asyncio.to_thread(lambda: stub.drawn):
            await asyncio.sleep(0.05)
        cancel()
        pressed = time.monotonic()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            await waiting
        return time.monotonic() - pressed

    assert asyncio.run(both()) < 1
    assert any("the server still finishes this" in words for words in said)
    if kind == "video":
        stub.until(lambda: any(one["method"] == "DELETE" for one in stub.requests))
    stub.told(release=True)
    made, _ = asyncio.run(run())
    if kind == "picture":
        assert torch.allclose(colours(made)[0], SEVEN, atol=1 / 255)
    else:
        assert made.get_components().images.shape == (5, 48, 64, 3)


def test_a_wait_that_is_too_long(stub, server):
    stub.next({"hold": True})
    assert "the server still finishes this picture" in refused("took longer than 1 s", draw, server, CAT, timeout=1)
    stub.told(release=True)


def test_a_busy_server_is_waited_for(stub, server):
    """Which LoRAs are on, it says only between two pictures."""
    async def both():
        stub.next({"delay": 1.5})
        return await asyncio.gather(jobs.draw(server, CAT), jobs.draw(server, Drawing("b", width=64, height=48, seed=8)))

    (first, _), (second, _) = asyncio.run(both())
    assert torch.allclose(colours(first)[0], SEVEN, atol=1 / 255) and not torch.equal(first, second)


def test_a_video_with_its_progress(stub, server, monkeypatch):
    stub.restart(name=NAME, model=T2V)
    stub.next({"delay": 4, "steps": 4})
    shown: list[float] = []
    monkeypatch.setattr(host.Waiting, "show", lambda self, done, total, picture=None: shown.append(done))
    video, report = film(server, FILM)
    assert video.get_components().images.shape == (5, 48, 64, 3) and video.get_frame_rate() == 8 and "5 frames" in report
    assert sorted(shown) == shown and len(set(shown) & {25, 50, 75}) >= 2
    asked, = stub.drawn
    assert (asked["seed"], asked["num_frames"], asked["fps"], asked["generator_device"], asked["negative_prompt"]) == (7, 5, 8, "cpu", "")


def test_a_first_frame(stub, server):
    stub.restart(name=NAME, model=I2V)
    film(server, FILM, start=torch.full((1, 24, 32, 3), 90 / 255))
    asked, = stub.drawn
    assert asked["images"][0]["mean"] == [90.0] * 3 and asked["negative_prompt"] == " " and asked["num_frames"] == 5
    refused("this needs V2V or F2V", film, server, FILM, clip=host.video_of_frames(torch.zeros(5, 16, 16, 3), 8))


@pytest.mark.parametrize("plan, word", [
    ({"error": "height must be divisible by 16"}, "the server failed: .*height must be divisible by 16"), ({"frames": 9}, "made 9 frames, and 5"),
    ({"size": [32, 48]}, "drew 32 x 48, and 64 x 48")])
def test_a_video_that_is_not_what_was_asked_for(stub, server, plan, word):
    stub.restart(name=NAME, model=T2V)
    stub.next(plan)
    refused(word, film, server, FILM)


def test_a_server_that_is_restarted_has_lost_the_video(stub, server):
    stub.restart(name=NAME, model=T2V)

    async def both():
        stub.next({"hold": True})
        waiting = asyncio.create_task(jobs.film(server, FILM))
        while not await asyncio.to_thread(lambda: stub.drawn):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(stub.restart, name=NAME, model=T2V)
        await waiting

    with pytest.raises(CheckpointError, match="restarted: the video is lost|there is no server"):
        asyncio.run(both())


def test_decoded_frames_without_loss(stub, server, monkeypatch):
    from pip._vendor import msgpack

    stub.restart(name=NAME, model=T2V)
    text = refused("lossless needs the package msgpack", film, server, FILM, transport="lossless")
    assert "pip install msgpack" in text
    monkeypatch.setitem(sys.modules, "msgpack", msgpack)
    refused("takes no picture or video to start from", film, server, FILM, start=torch.zeros(1, 8, 8, 3), transport="lossless")
    video, _ = film(server, Drawing("a cat", width=64, height=48, steps=4, seed=7, frames=5, fps=8, flow_shift=3.0), transport="lossless")
    frames = video.get_components().images
    assert torch.allclose(frames[:, 0, 0], SEVEN * torch.linspace(0.5, 1, 5)[:, None], atol=1e-6) and frames.shape == (5, 48, 64, 3)
    assert stub.drawn[-1]["flow_shift"] == 3.0


def test_what_is_too_large_is_not_read(stub, server, monkeypatch):
    monkeypatch.setattr(results, "largest", lambda drawing: 100)
    refused("does not answer as SGLang does", draw, server, CAT)


@pytest.mark.parametrize("model", ["FLUX.1-dev", EDITS, T2V])
def test_doctor_has_a_server_draw(stub, server, model):
    """Something small, with the LoRAs that are on: they are other clients'."""
    stub.restart(name=NAME, model=model)
    stub.request("/v1/set_lora", {"lora_nickname": "x", "lora_path": "/x", "strength": 1.0})
    found = report.of_server(server.server, picture=True)
    assert [check["what"] for check in found["checks"]][-1].startswith("it drew something small in ")
    asked, = stub.drawn
    assert asked["num_inference_steps"] == 1 and asked["loras"]["transformer"][0]["nicknames"] == ["x"] and asked["seed"] == 0
    done = [sys.executable, str(PACK), "doctor", "--server", server.server, "--picture", "--json"]
    if model == T2V:
        stub.next({"error": "out of memory"})
        run = subprocess.run(done, capture_output=True, text=True, check=False)
        assert run.returncode == 1 and "out of memory" in json.loads(run.stdout)["checks"][-1]["what"]


def test_a_model_that_needs_more_than_a_prompt_is_not_tried(stub, server):
    stub.restart(name=NAME, model=I2V)
    found = report.of_server(server.server, picture=True)
    assert found["checks"][-1]["level"] == "refused" and "more than a prompt: I2V" in found["checks"][-1]["what"]


def test_two_nodes_of_one_graph_want_other_loras_of_one_server(stub, server):
    """They take turns, where at once each would undo the other's; those that want the same go together."""
    async def all_of_them():
        stub.next(*4 * [{"delay": 0.3}])
        return await asyncio.gather(*(jobs.draw(one, CAT, count=2) for one in (server, server.with_lora(A))))

    (plain, _), (styled, _) = asyncio.run(all_of_them())
    assert not torch.equal(plain, styled)
    on = [[path["path"] for active in one["loras"].values() for path in active] for one in stub.drawn]
    assert on == [[], [], ["owner/a"], ["owner/a"]], "and they change once"


def test_a_node_that_waits_for_its_turn_hears_cancel(stub, server, cancel):
    async def both():
        stub.next({"hold": True})
        first = asyncio.create_task(jobs.draw(server, CAT))
        while not await asyncio.to_thread(lambda: stub.drawn):
            await asyncio.sleep(0.05)
        second = asyncio.create_task(jobs.draw(server.with_lora(A), CAT))
        await asyncio.sleep(0.5)
        first.cancel()  # as ComfyUI does with the others once one has heard it
        cancel()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            await second
        await asyncio.gather(first, return_exceptions=True)
        cancel_again = asyncio.create_task(jobs.draw(server, CAT))
        await asyncio.to_thread(stub.told, release=True)
        return await cancel_again

    images, _ = asyncio.run(both())
    assert images.shape == (1, 48, 64, 3) and len(stub.drawn) == 2


def test_the_dead_do_not_say_which_loras_are_on(stub, server):
    """None is what a pipeline without them says, and not what nobody says."""
    address = address_of(server.server)
    assert asyncio.run(client.loras(address)) == {}
    stub.told(kill=True)
    stub.until(lambda: stub.request("/health")[0] == 503)
    with pytest.raises(CheckpointError, match="its workers died"):
        asyncio.run(client.loras(address))

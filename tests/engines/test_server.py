"""SGLang's real server on this CPU, without any client of ours: what the clients and `serve` lean on."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file

from support import flux, miniature
from support.common import rel_l2
from support.lora import load_lora
from support.miniature import psnr
from support.sglang_real import DRAWN, SIZE, by_diffusers, pixels, with_loras

pytestmark = pytest.mark.server

ASKED = {**DRAWN, "response_format": "b64_json"}
DECODED = {"width": SIZE, "height": SIZE, "num_inference_steps": 2, "seed": 7, "generator_device": "cpu", "rollout": False}


def test_what_it_serves(server):
    model, = server.request("/v1/models")[1]["data"]
    assert (model["num_gpus"], model["task_type"], model["pipeline_name"]) == (1, "T2I", "FluxPipeline")
    assert server.request("/server_info")[1]["version"] == "0.5.23"


def test_a_seed_draws_one_picture(server):
    """Byte by byte, and the one that the prompt asks for: the nearest of the six that the miniature has learned."""
    first, again, other = (server.picture(**DRAWN, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG" and picture.size == (SIZE, SIZE)
    drawn = pixels(first).transpose(2, 0, 1) / 127.5 - 1
    near = [psnr(drawn, learned, 2) for learned in miniature.pictures()[:, 0]]
    assert miniature.PROMPTS[near.index(max(near))] == "a cat" and max(near) > 20


def test_it_draws_as_diffusers_does(server, miniature_folder):
    """From the noise of the CPU's generator in BF16: what it leaves are roundings of BF16 in another order."""
    assert psnr(pixels(server.picture(**DRAWN, seed=7)), by_diffusers(miniature_folder, 7), 255) >= 45


def test_it_leaves_the_duties_to_the_client(server):
    """Without a format a JPEG, without a seed always the same one, another size than was asked for, and any model's name
    will do."""
    plain = {key: value for key, value in DRAWN.items() if key != "output_format"}
    assert Image.open(io.BytesIO(server.picture(**plain, seed=7))).format == "JPEG"
    assert server.picture(**DRAWN) == server.picture(**DRAWN, seed=42, model="nope", no_such_field=1)
    assert Image.open(io.BytesIO(server.picture(**{**DRAWN, "size": "100x100", "num_inference_steps": 1}))).size == (96, 96)


def test_an_abandoned_request_is_finished_first(server):
    """A client that goes away does not stop it, and whatever comes next waits."""
    with pytest.raises(requests.Timeout):
        requests.post(f"{server.url}/v1/images/generations", json={**ASKED, "num_inference_steps": 150}, timeout=0.5)
    with pytest.raises(requests.Timeout):
        requests.get(f"{server.url}/v1/list_loras", timeout=0.3)
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    assert server.request("/v1/list_loras")[0] == 200


class TestLoras:
    @pytest.fixture(autouse=True)
    def without(self, server):
        yield
        assert server.request("/v1/unmerge_lora_weights", {"target": "all"})[0] == 200

    def put(self, server, *loras: tuple[str, Any, float], **more: Any) -> tuple[int, Any]:
        names, files, strengths = zip(*loras, strict=True)
        return server.request("/v1/set_lora", {"lora_nickname": list(names), "lora_path": list(map(str, files)),
                                               "strength": list(strengths), **more})

    @pytest.mark.parametrize("mode", ["merge", "dynamic"])
    def test_one_on_and_off(self, server, miniature_folder, loras, mode):
        """On: as its definition says. Off: byte by byte what was before."""
        before = server.picture(**DRAWN, seed=7)
        assert self.put(server, ("qt-a", loras[0], 0.8), merge_mode=mode)[0] == 200
        drawn = pixels(server.picture(**DRAWN, seed=7))
        assert psnr(drawn, by_diffusers(miniature_folder, 7, with_loras(miniature_folder, (loras[0], 0.8))), 255) >= 40
        assert psnr(drawn, pixels(before), 255) < 25
        assert server.request("/v1/unmerge_lora_weights", {"target": "all"})[0] == 200
        assert server.picture(**DRAWN, seed=7) == before

    def test_two(self, server, miniature_folder, loras):
        pair = ((loras[0], 0.5), (loras[1], -0.25))
        assert self.put(server, ("qt-a", *pair[0]), ("qt-b", *pair[1]))[0] == 200
        expected = by_diffusers(miniature_folder, 7, with_loras(miniature_folder, *pair))
        assert psnr(pixels(server.picture(**DRAWN, seed=7)), expected, 255) >= 40

    def test_a_file_that_is_not_there(self, server):
        status, answer = self.put(server, ("qt-x", "/nowhere/x.safetensors", 1.0))
        assert status == 500 and answer == {
            "detail": "Failed to set LoRA adapter: Weight path does not exist: /nowhere/x.safetensors"}


def shape(value: Any) -> Any:
    """Names and types of an answer; of a list its first."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def test_the_app_over_made_pictures_answers_as_this_one(server, stub, loras):
    """What tests of clients lean on (support/sglang_stub): same routes, same statuses, same names and texts."""
    name = "qt-compared"
    lora = {"lora_nickname": [name], "lora_path": [str(loras[0])], "strength": [0.5], "target": "all"}
    asked: list[tuple[str, Any]] = [
        ("/health", None), ("/liveness", None), ("/v1/models", None), ("/v1/list_loras", None), ("/v1/set_lora", lora),
        ("/v1/list_loras", None), ("/v1/set_lora", {**lora, "target": "transformer_2"}), ("/v1/list_loras", None),
        ("/v1/set_lora", {**lora, "strength": [0.5, 1.0]}), ("/v1/set_lora", {**lora, "target": "vae"}),
        ("/v1/set_lora", {"lora_nickname": "qt-unknown"}), ("/v1/unmerge_lora_weights", {"target": "all"}),
        ("/v1/unmerge_lora_weights", {"target": "all"}), ("/v1/list_loras", None), ("/v1/videos/none", None),
        ("/v1/images/generations", {**ASKED, "num_inference_steps": 0}), ("/v1/images/generations", {**ASKED, "seed": {}}),
        ("/v1/images/generations", {**ASKED, "task_type": "T2V"}), ("/v1/videos", {"prompt": "a cat"})]
    for path, body in asked:
        ours, theirs = stub.request(path, body), server.request(path, body)
        if path == "/v1/list_loras":  # this one has had others on
            theirs[1]["loaded_adapters"] = [one for one in theirs[1]["loaded_adapters"] if one["nickname"] == name]
        if path == "/v1/models":
            ours[1]["data"][0].update(id=theirs[1]["data"][0]["id"], root=theirs[1]["data"][0]["root"],
                                      created=theirs[1]["data"][0]["created"])
        assert ours == theirs, (path, body)
    ours, theirs = (one.request("/v1/images/generations", {**ASKED, "seed": 7})[1] for one in (stub, server))
    assert shape(ours).keys() - {"peak_memory_mb"} == shape(theirs).keys() - {"peak_memory_mb"}  # no memory to tell on a CPU
    ours["data"][0]["file_path"] = None  # kept, where there is an output folder
    assert shape(ours["data"]) == shape(theirs["data"])
    codes = [requests.post(f"{one.url}/rollout/generate", json={"prompt": "a cat", **DECODED}, timeout=60) for one in (stub, server)]
    assert {(code.status_code, code.headers["content-type"]) for code in codes} == {(200, "application/msgpack")}
    assert abs(len(codes[0].content) - len(codes[1].content)) < 100, "as many bytes of frames"
    assert numpy.isfinite(pixels(server.picture(**DRAWN, seed=7))).all()


def test_the_loras_of_these_tests_are_comfyuis_too(miniature_folder, loras, tmp_path):
    """One file for both: ComfyUI's own node draws with it what its definition says."""
    from quantized_transformers.nodes.load_base import QT_LoadBaseModel

    base = QT_LoadBaseModel.execute("", reference=str(miniature_folder), dtype="fp32").args[0]
    before = flux.comfy_velocity(base, **flux.inputs())
    (tmp_path / "loras").mkdir()
    patched = flux.comfy_velocity(load_lora(base, load_file(loras[0]), tmp_path / "loras"), **flux.inputs())
    expected = flux.diffusers_velocity(with_loras(miniature_folder, (loras[0], 1.0), dtype=torch.float32), **flux.inputs())
    assert rel_l2(patched, expected) < 1e-5 and rel_l2(before, expected) > 0.1

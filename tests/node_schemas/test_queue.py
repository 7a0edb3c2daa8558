"""What POST /prompt says before anything runs: every node that would fail, in one answer, with codes that stay."""

from __future__ import annotations

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from support import flux, text_encoders
from support.routes import ask
from support.server import Server, error_of
from support.workflow import apply_override, load_base, queued, text_to_image

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    base = tmp_path_factory.mktemp("queue")
    folder = base / "models" / "diffusers"
    shutil.copytree(tiny.pipeline, folder / "tiny-flux")
    shutil.copytree(tiny.fp8, folder / "tiny-fp8")
    smaller = flux.make(double=1)  # FLUX.1, and another
    smaller.save_pretrained(folder / "other-flux")
    for family in ("flux1", "wan"):
        text_encoders.base(family, folder / f"texts-{family}")
    lacking = load_file(next((folder / "tiny-fp8").glob("*.safetensors")))
    lacking.pop("transformer_blocks.1.attn.to_q.weight")
    shutil.copytree(tiny.fp8, folder / "lacking")
    save_file(lacking, str(next((folder / "lacking").glob("*.safetensors"))))
    (base / "models" / "diffusion_models").mkdir()
    shutil.copy(next((tiny.pipeline / "transformer").glob("*.safetensors")), base / "models" / "diffusion_models" / "plain.safetensors")
    (base / "models" / "diffusion_models" / "noise.safetensors").write_bytes(b"not a header" * 9)
    with Server(base) as running:
        yield running


def refused(server, prompt) -> dict[str, str]:
    """node -> what its (only different) error says, of a prompt that is refused."""
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400, sorted(answer["node_errors"])
    found = {}
    for node, entry in answer["node_errors"].items():
        assert {error["type"] for error in entry["errors"]} == {"custom_validation_failed"}
        texts = {error["details"].partition(" - ")[2] for error in entry["errors"]}
        found[node], = texts
    return found


def codes(found: dict[str, str]) -> dict[str, str]:
    return {node: re.search(r"\n  code: (\w+)$", text)[1] for node, text in found.items()}


def accepted(server, prompt) -> str:
    """Queue a prompt that must not be refused; what it fails on when it runs."""
    return error_of(server.run(prompt))


def override(model: str, name: str, **inputs):
    return {"class_type": "QT_ApplyTransformerOverride", "inputs": {"model": [model, 0], "override": name, **inputs}}


def texts(name: str, prefix: str, model: str):
    """A sampler of `model` with what text encoders make of a prompt."""
    nodes = text_to_image([model, 0], prefix)
    nodes.pop(f"{prefix}cond")
    nodes[f"{prefix}clip"] = {"class_type": "QT_LoadBaseTextEncoder", "inputs": {"reference": name}}
    nodes[f"{prefix}text"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [f"{prefix}clip", 0], "text": "a"}}
    nodes[f"{prefix}guide"] = {"class_type": "FluxGuidance", "inputs": {"conditioning": [f"{prefix}text", 0], "guidance": 3.5}}
    nodes[f"{prefix}sample"]["inputs"] |= {"positive": [f"{prefix}guide", 0], "negative": [f"{prefix}text", 0]}
    return nodes


def test_every_node_in_one_answer(server):
    found = refused(server, {
        "gone": load_base("somebody/something"), **text_to_image(["gone", 0], "a_"),
        "known": {"class_type": "QT_LoadBaseModel", "inputs": {"base_model": "black-forest-labs/FLUX.1-dev"}},
        **text_to_image(["known", 0], "b_"),
        "none": {"class_type": "QT_LoadBaseModel", "inputs": {"reference": ""}}, **text_to_image(["none", 0], "c_"),
        "noise": load_base("noise.safetensors"), **text_to_image(["noise", 0], "d_"),
        "base": load_base("tiny-flux"), "lacking": override("base", "lacking"), **text_to_image(["lacking", 0], "e_"),
        "other": override("base", "other-flux"), **text_to_image(["other", 0], "f_"),
        "svdq": {"class_type": "QT_NunchakuSVDQLoader", "inputs": {"reference": "tiny-fp8"}}, **text_to_image(["svdq", 0], "g_"),
        **texts("texts-wan", "h_", "base"),
        "vae": {"class_type": "QT_LoadBaseVAE", "inputs": {"reference": "tiny-flux"}},
        "seen": {"class_type": "VAEDecode", "inputs": {"vae": ["vae", 0], "samples": ["a_empty", 0]}},
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["seen", 0]}}})
    assert codes(found) == {
        "gone": "missing", "known": "missing", "none": "nothing_chosen", "noise": "unreadable", "lacking": "not_loadable",
        "other": "does_not_fit", "svdq": "not_loadable", "h_clip": "other_text_encoder", "vae": "unreadable"}
    assert "hf download somebody/something" in found["gone"] and "hf download black-forest-labs/FLUX.1-dev" in found["known"]
    assert "transformer_blocks.1.attn.to_q" in found["lacking"] and "tiny-flux" in found["other"]
    assert "text encoders of Wan" in found["h_clip"] and "samples FLUX.1" in found["h_clip"]
    assert all("what to do" in text for text in found.values())


@pytest.mark.parametrize("above", ["lora", "host"])
def test_the_base_is_looked_for_through_other_nodes(server, above):
    base = {"lora": {"base": load_base("tiny-flux", "defer to override"),
                     "up": {"class_type": "ModelSamplingFlux", "inputs": {
                         "model": ["base", 0], "max_shift": 1.15, "base_shift": 0.5, "width": 64, "height": 64}}},
            "host": {"up": {"class_type": "UNETLoader", "inputs": {"unet_name": "plain.safetensors", "weight_dtype": "default"}}}}[above]
    found = refused(server, {**base, "q": override("up", "other-flux"), **text_to_image(["q", 0], "x_")})
    assert codes(found) == {"q": "does_not_fit"}
    assert not accepted(server, {**base, "q": override("up", "tiny-fp8"), **text_to_image(["q", 0], "x_", steps=1, size=64)})


def test_a_service_gives_references_alone(server):
    done = server.run({
        "base": {"class_type": "QT_LoadBaseModel", "inputs": {"reference": "tiny-flux", "weights": "defer to override"}},
        "q": {"class_type": "QT_ApplyTransformerOverride", "inputs": {"model": ["base", 0], "reference": "tiny-fp8"}},
        "look": {"class_type": "QT_InspectCheckpoint", "inputs": {"reference": "tiny-fp8"}}, **text_to_image(["q", 0], "s_", size=64)})
    assert not error_of(done) and "this checkpoint loads" in done["outputs"]["look"]["text"][0]


def test_what_is_not_refused(server):
    """What may be right: text encoders that fit, an Inspect of what does not load, a download that is asked for, and what
    comes by a link."""
    look = {"class_type": "QT_InspectCheckpoint", "inputs": {"reference": "lacking"}}
    assert "transformer_blocks.1.attn.to_q" in server.run({"look": look})["outputs"]["look"]["text"][0]
    fits = {"base": load_base("tiny-flux"), **texts("texts-flux1", "t_", "base")}
    status, answer = server.post("/prompt", {"prompt": fits})
    assert status == 200, answer
    asked = {"base": load_base("somebody/something", download_missing=True), **text_to_image(["base", 0], "d_")}
    assert "somebody/something" in accepted(server, asked)
    linked = {"name": {"class_type": "PrimitiveString", "inputs": {"value": "nowhere"}},
              "base": load_base(["name", 0]), **text_to_image(["base", 0], "l_")}
    assert "nowhere was found neither" in accepted(server, linked)


def test_in_the_language_of_the_page(server):
    """Refusals, errors while it runs, and reports: in the language that the page which queues has said; codes and class
    names are the same in every one."""
    def queue(prompt: dict, client: str) -> tuple[int, dict]:
        return server.post("/prompt", {"prompt": prompt, "client_id": client})

    for client, accepts, language in (("chinese", "fr, zh;q=0.9, en;q=0.8", "zh"), ("english", "en-GB,en", "en"),
                                      ("french", "fr", "en")):
        assert ask(server, "POST", "language", json={"client": client}, headers={"Accept-Language": accepts}) == (
            200, {"language": language})
    wrong = {"base": load_base("nowhere"), **text_to_image(["base", 0], "n_")}
    late = {"name": {"class_type": "PrimitiveString", "inputs": {"value": "nowhere"}},
            "base": load_base(["name", 0]), **text_to_image(["base", 0], "l_")}
    look = {"class_type": "QT_InspectCheckpoint", "inputs": {"reference": "lacking"}}
    for client, not_found, todo, refused, problem in (
            ("chinese", "找不到 nowhere：", "解决方法：", "此检查点被拒绝加载", "问题："),
            ("english", "nowhere was found neither", "what to do: ", "this checkpoint is refused", "PROBLEM: "),
            ("french", "nowhere was found neither", "what to do: ", "this checkpoint is refused", "PROBLEM: "),
            ("unknown", "nowhere was found neither", "what to do: ", "this checkpoint is refused", "PROBLEM: ")):
        status, answer = queue(wrong, client)
        text = answer["node_errors"]["base"]["errors"][0]["details"]
        assert status == 400 and not_found in text and todo in text and text.endswith("\n  code: missing"), text
        history = server.wait_for(queue(late, client)[1]["prompt_id"])
        error = next(data for kind, data in history["status"]["messages"] if kind == "execution_error")
        assert not_found in error["exception_message"] and todo in error["exception_message"], client
        assert error["exception_type"] == "quantized_transformers.MissingFiles"
        name = f"look_{client}"  # a report that was made for another page is kept by ComfyUI under its node's name
        report, = server.wait_for(queue({name: look}, client)[1]["prompt_id"])["outputs"][name]["text"]
        assert refused in report and problem in report and "transformer_blocks.1.attn.to_q" in report, client


def test_a_fault_of_the_check_stops_nothing(tiny, monkeypatch, caplog):
    from quantized_transformers.nodes.load_base import QT_LoadBaseModel
    from quantized_transformers.views import helper

    assert "no such file" in queued(QT_LoadBaseModel, reference="/nowhere/at/all")
    monkeypatch.setattr(helper.Helper, "ask", lambda *_: 1 / 0)
    assert queued(QT_LoadBaseModel, reference="/nowhere/at/all") is True
    assert "node 1 cannot be checked" in caplog.text


def test_a_check_reads_in_the_helper(tiny, monkeypatch, tmp_path):
    """The host asks in its event loop. What a long header has wrong is found there alone; what a short one has, here, too:
    other packs may have taught this ComfyUI a model that the helper's does not know."""
    from quantized_transformers.nodes.load_base import QT_LoadBaseModel
    from quantized_transformers.views import queue_check

    def lacking(name: str, more: int) -> str:
        tensors = load_file(next(tiny.fp8.glob("*.safetensors")))
        tensors.pop("transformer_blocks.1.attn.to_q.weight")
        shutil.copytree(tiny.fp8, tmp_path / name)
        save_file(tensors, str(next((tmp_path / name).glob("*.safetensors"))), metadata={"x": "y" * more})
        return str(tmp_path / name)

    here = []
    card = queue_check.card
    monkeypatch.setattr(queue_check, "card", lambda query: here.append(query.reference) or card(query))
    short, long = lacking("short", 10), lacking("long", 1_500_000)
    for reference in (short, long):
        assert queued(QT_LoadBaseModel, reference=reference).endswith("code: not_loadable")
    assert queued(QT_LoadBaseModel, reference=str(tiny.fp8)) is True
    assert here == [short]
    monkeypatch.setattr(queue_check, "problem", lambda *_: None)  # this ComfyUI knows better
    assert queued(QT_LoadBaseModel, reference=short) is True
    assert queued(QT_LoadBaseModel, reference=long).endswith("code: not_loadable")


def test_a_file_that_changes_is_looked_at_again(server):
    folder = server.base / "models" / "diffusers" / "changing"
    shutil.copytree(server.base / "models" / "diffusers" / "lacking", folder)
    prompt = {"base": load_base("tiny-flux", "defer to override"), "q": apply_override(["base", 0], "changing"),
              **text_to_image(["q", 0], "c_", steps=1, size=64)}
    assert codes(refused(server, prompt)) == {"q": "not_loadable"}
    shutil.copy(next((server.base / "models" / "diffusers" / "tiny-fp8").glob("*.safetensors")),
                next(folder.glob("*.safetensors")))
    assert not accepted(server, prompt)

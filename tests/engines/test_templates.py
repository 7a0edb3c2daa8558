"""The templates that draw on a server, queued as committed in a real ComfyUI, against SGLang's own app: what they ask of it
is what their definitions say, and what comes back is saved."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from browser.definitions import FOX, LOGO, WAN_NEGATIVE, WATERCOLOR, WORKFLOWS
from browser.graph import SEED
from browser.notes import NOTES
from PIL import Image

from support.pack import COMFYUI, PACK
from support.server import Server, error_of, outputs

pytestmark = pytest.mark.server

NAMES = [workflow.name for workflow in WORKFLOWS if workflow.flat]
PROMPTS = {name: json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
FLUX, WAN, EDIT = NAMES
# What SGLang's workers must be told, after its own reading of the request.
DRAWN = {
    FLUX: {"prompt": LOGO, "negative_prompt": None, "width": 1024, "height": 1024, "num_inference_steps": 20, "guidance_scale": 3.5,
           "data_type": "IMAGE"},
    WAN: {"prompt": FOX, "negative_prompt": WAN_NEGATIVE, "width": 832, "height": 480, "num_frames": 81, "fps": 16,
          "num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "data_type": "VIDEO"},
    EDIT: {"prompt": WATERCOLOR, "num_inference_steps": 40, "true_cfg_scale": 4.0, "data_type": "IMAGE"},
}


@pytest.fixture(scope="module")
def comfyui(stub_started, tmp_path_factory):
    base = tmp_path_factory.mktemp("templates")
    (base / "input").mkdir()
    shutil.copy(COMFYUI / "input" / "example.png", base / "input")
    with Server(base, env={"QT_SERVER_URL": f"http://127.0.0.1:{stub_started.port}"}) as running:
        yield running


def serve(stub, name: str) -> str:
    """Have the app serve what a template names; the name is what `serve` would give it."""
    note = NOTES[name]
    identity = f"qt:{note.base}@0123456789ab+transformer={note.repo}@ba9876543210"
    stub.restart(model=note.base.split("/")[1], name=identity)
    return identity


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, stub, comfyui):
    identity = serve(stub, name)
    history = comfyui.run(PROMPTS[name])
    assert not error_of(history), error_of(history)
    asked, = stub.drawn
    wanted = DRAWN[name] | {"seed": SEED, "generator_device": "cpu"}
    assert {key: asked[key] for key in wanted} == wanted
    file, = [path for path in outputs(comfyui, history, "images") if path.parent.is_relative_to(comfyui.base / "output")]
    assert file.suffix == (".mp4" if name == WAN else ".png") and file.name.startswith(name)
    if name == EDIT:  # the picture's shape, at a megapixel, in multiples of 32
        scaled = Image.open(file).size
        assert scaled == (asked["width"], asked["height"]) and not any(side % 32 for side in scaled)
        assert scaled[0] * scaled[1] == pytest.approx(1 << 20, rel=0.05) and len(asked["images"]) == 1
        whole = Image.open(COMFYUI / "input" / "example.png").size
        assert scaled[0] / scaled[1] == pytest.approx(whole[0] / whole[1], rel=0.05)
    said = {PROMPTS[name][key]["_meta"]["title"]: output["text"][0] for key, output in history["outputs"].items() if "text" in output}
    assert identity in said["Report: what was drawn"]
    note = NOTES[name]
    assert f"serve {note.base} --override {note.repo}" in said["Report: how to start it"]


def test_a_server_of_another_override_is_refused(stub, comfyui):
    """With the command that starts the right one, and nothing drawn."""
    serve(stub, EDIT)
    prompt = copy.deepcopy(PROMPTS[FLUX])
    error = error_of(comfyui.run(prompt))
    assert NOTES[EDIT].repo in error and f"serve {NOTES[FLUX].base} --override {NOTES[FLUX].repo}" in error
    assert not stub.drawn

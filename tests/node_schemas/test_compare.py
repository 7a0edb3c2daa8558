"""Save Quantized Model and Compare Models in a real ComfyUI server, and the command `compare`; with and without matplotlib."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from support import vaes
from support.pack import PACK
from support.server import Server, outputs
from support.workflow import load_base, text_to_image

pytestmark = pytest.mark.host


def compare_models(reference: list, model: list, **inputs) -> dict:
    return {"class_type": "QT_CompareModels", "inputs": {
        "reference_model": reference, "model": model, "positive": ["a_cond", 0], "negative": ["a_cond", 0],
        "latent_image": ["a_empty", 0], "seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
        "denoise": 1.0, **inputs}}


def load_vae(base) -> dict:
    return {"class_type": "QT_LoadBaseVAE", "inputs": {"base_model": "black-forest-labs/FLUX.1-dev", "reference": str(base)}}


@pytest.fixture
def without(tmp_path) -> dict[str, str]:
    """The environment of processes in which matplotlib is not there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['matplotlib'] = None", encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_saved_and_compared_in_a_server(tiny, tmp_path):
    """Saved in stock format, loaded by ComfyUI's own node from its list, and compared with the source, with a VAE."""
    base = tmp_path / "vae"
    vaes.save_base("flux1", base)
    workflow = {**text_to_image(["source", 0], "a_", steps=2, size=64), "source": load_base(str(tiny.fp8)),
                "save": {"class_type": "QT_SaveQuantizedModel", "inputs": {
                    "model": ["source", 0], "filename": "diffusion_models/mine", "format": "stock", "overwrite": False}}}
    keep = {name: workflow[name] for name in ("source", "save")}
    with Server(tmp_path / "server") as server:
        history = server.run(keep)
        assert history["status"]["status_str"] == "success", history["status"]
        assert "stock ComfyUI loads this file" in history["outputs"]["save"]["text"][0]
        assert (server.base / "output" / "diffusion_models" / "mine.safetensors").is_file()
        names = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0]
        assert "mine.safetensors" in names
        compare = compare_models(["source", 0], ["stock", 0], vae=["vae", 0])
        vae = load_vae(base)
        stock = {"class_type": "UNETLoader", "inputs": {"unet_name": "mine.safetensors", "weight_dtype": "default"}}
        parts = {name: workflow[name] for name in ("source", "a_cond", "a_empty")}
        history = server.run({**parts, "compare": compare, "vae": vae, "stock": stock})
        assert history["status"]["status_str"] == "success", history["status"]
        report = history["outputs"]["compare"]["text"][0]
        assert "1 decoded pictures 64 x 64" in report and "PSNR" in report
        picture, = outputs(server, history, "images")
        assert Image.open(picture).size[0] >= 1000
        changed = {**keep, "save": {**keep["save"], "inputs": {**keep["save"]["inputs"], "format": "exact"}}}
        history = server.run(changed)
        messages = [d for kind, d in history["status"]["messages"] if kind == "execution_error"]
        assert "this file exists" in messages[0]["exception_message"]
        outside = {**keep, "save": {**keep["save"], "inputs": {**keep["save"]["inputs"], "filename": "/etc/model"}}}
        status, answer = server.post("/prompt", {"prompt": outside})
        assert status == 400 and "outside of ComfyUI's output and model folders" in json.dumps(answer)


def test_command(tiny, tmp_path):
    done = subprocess.run([sys.executable, str(PACK), "compare", str(tiny.pipeline), str(tiny.mixed), "--json", "--plot",
                           str(tmp_path / "plot.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{"):])
    assert found["architecture"] == "FLUX.1" and len(found["layers"]) == 50 and 30 < found["layers"][0]["snr_db"] < 32
    assert Image.open(tmp_path / "plot.png").size == (1300, 600)


@pytest.mark.full
def test_nodes_without_matplotlib(tiny, tmp_path, without):
    """Both outputs are there and go on: the report says what is missing, the picture has the pair, and a line of text."""
    base = tmp_path / "vae"
    vaes.save_base("flux1", base)
    parts = text_to_image(["source", 0], "a_", size=64)
    workflow = {name: parts[name] for name in ("a_cond", "a_empty")} | {
        "source": load_base(str(tiny.bf16)), "other": load_base(str(tiny.fp8)), "vae": load_vae(base),
        "plain": compare_models(["source", 0], ["other", 0]),
        "pair": compare_models(["source", 0], ["other", 0], vae=["vae", 0])}
    for name in ("plain", "pair"):
        workflow[f"{name}_picture"] = {"class_type": "SaveImage", "inputs": {"images": [name, 1], "filename_prefix": name}}
        workflow[f"{name}_report"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 0]}}
    with Server(tmp_path / "server", env=without) as server:
        history = server.run(workflow)
        assert history["status"]["status_str"] == "success", history["status"]
        for name, tall in (("plain", 24 + 8), ("pair", 24 + 64 + 8 + 24 + 8)):
            report = history["outputs"][f"{name}_report"]["text"][0]
            assert report.count("no plot: plots need matplotlib") == 1 and "PSNR" in report
            assert "`python -m pip install matplotlib` with the Python that runs ComfyUI" in report
            saved, = history["outputs"][f"{name}_picture"]["images"]
            picture = Image.open(server.base / "output" / saved["filename"]).convert("L")
            assert picture.size == (1100, tall)
            assert picture.crop((0, tall - 32, 1100, tall)).getextrema()[1] > 200, "the line of text"


@pytest.mark.full
def test_command_without_matplotlib(tiny, tmp_path, without):
    def compare(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(PACK), "compare", *map(str, arguments)], capture_output=True, text=True,
                              env={**os.environ, **without}, check=False)

    plot = tmp_path / "plot.png"
    refused = compare("/not/there", "/not/there/either", "--plot", plot)  # before these are looked for
    assert refused.returncode and "plots need matplotlib" in refused.stderr + refused.stdout and not plot.exists()
    assert "/not/there" not in refused.stderr + refused.stdout
    done = compare(tiny.bf16, tiny.mixed)
    assert done.returncode == 0 and "all Linear weights" in done.stdout, done.stderr[-2000:]

"""Save Quantized Model and Compare Models in a real ComfyUI server, and the command `compare`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from support import vaes
from support.pack import PACK
from support.server import Server, outputs
from support.workflow import load_base, text_to_image

pytestmark = pytest.mark.host


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
        compare = {"class_type": "QT_CompareModels", "inputs": {
            "reference_model": ["source", 0], "model": ["stock", 0], "positive": ["a_cond", 0], "negative": ["a_cond", 0],
            "latent_image": ["a_empty", 0], "vae": ["vae", 0], "seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
            "scheduler": "simple", "denoise": 1.0}}
        vae = {"class_type": "QT_LoadBaseVAE", "inputs": {"base_model": "black-forest-labs/FLUX.1-dev",
                                                          "reference": str(base)}}
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

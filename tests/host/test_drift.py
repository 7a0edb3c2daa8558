"""`dev.py drift` says of a tree's source what host/check.py says of the running ComfyUI."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import drift
import pytest

from quantized_transformers.host import touches
from quantized_transformers.host.contract import FEATURES
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.unit

LINES = [line for found in FEATURES.values() for line in found.touches if not line.endswith(" ?")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The source of this ComfyUI, to be changed."""
    root = tmp_path_factory.mktemp("tree") / "ComfyUI"
    root.mkdir()
    for folder in ("comfy", "comfy_api"):
        shutil.copytree(COMFYUI / folder, root / folder, ignore=lambda folder, names: [
            name for name in names if "." in name and not name.endswith(".py") or name == "__pycache__"])
    for path in COMFYUI.glob("*.py"):
        shutil.copy(path, root)
    return root


def test_the_installed_tree_has_it_all():
    """Every line is found in the source, so none is passed over; but comfy-kitchen, which is no part of the tree."""
    tree = drift.Tree(COMFYUI)
    assert not {line: what for line in LINES if (what := drift.problem(tree, touches.parse(line), touches.binds))}
    passed_over = {touches.parse(line).module.split(".")[0] for line in LINES if not tree.has_package(touches.parse(line).module)}
    assert passed_over == {"comfy_kitchen"}


@pytest.mark.part(3)
@pytest.mark.parametrize("file, old, new, feature, name", [
    ("comfy/sd.py", "def load_text_encoder_state_dicts(", "def load_encoders(", "text encoders",
     "comfy.sd.load_text_encoder_state_dicts"),
    ("comfy/sd.py", "def load_diffusion_model_state_dict(sd, model_options={}, ",
     "def load_diffusion_model_state_dict(sd, *, options={}, ", "transformers", "load_diffusion_model_state_dict (called"),
    ("comfy/model_patcher.py", "def get_clone_model_override(", "def get_model_override(", "overrides",
     "ModelPatcher.get_clone_model_override"),
    ("comfy/ops.py", "def _forward(self, input, weight, bias):", "def _run(self, input, weight, bias):",
     "quantized layers", "mixed_precision_ops.Linear._forward"),
    ("comfy/ops.py", "self._full_precision_mm_config", "self._config_of_mm", "quantized layers",
     "Linear._full_precision_mm_config"),
    ("comfy/cli_args.py", "enable-cors-header", "cors-header", "web routes", "comfy.cli_args.args.enable_cors_header"),
    ("comfy/latent_formats.py", "", None, "VAEs", "comfy.latent_formats"),
])
def test_what_is_gone_is_said(file, old, new, feature, name, copy):
    path = copy / file
    before = path.read_text(encoding="utf-8")
    try:
        if new is None:
            path.unlink()
        else:
            changed = re.sub(re.escape(old), new, before)
            assert changed != before
            path.write_text(changed, encoding="utf-8")
        sentences = drift.lacks(copy)
    finally:
        path.write_text(before, encoding="utf-8")
    assert name in sentences[feature] and sentences[feature].endswith(FEATURES[feature].stops)
    assert not drift.lacks(copy)[feature]


@pytest.mark.full
def test_the_command(copy):
    """Both halves, on a tree where a name is gone that only comfy-import-guard would miss."""
    done = subprocess.run([sys.executable, str(PACK / "tests" / "drift.py"), str(copy)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all there") == len(FEATURES) and "0 breaking reference(s)" in done.stdout
    path = copy / "comfy" / "diffusers_convert.py"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("def convert_vae_state_dict", "def convert_vae"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(PACK / "tests" / "drift.py"), str(copy)], capture_output=True, text=True,
                          check=False)
    path.write_text(before, encoding="utf-8")
    assert done.returncode == 1 and "1 will break" in done.stdout
    assert "lacks comfy.diffusers_convert.convert_vae_state_dict: Load Base VAE does not work" in done.stdout

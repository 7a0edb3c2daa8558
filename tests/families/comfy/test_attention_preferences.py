"""`<module>.comfy_attention.config`: which attention kernel a module prefers, by a file or by a patch.

ComfyUI has it since about 0.38. Hosts before get a stand-in of its object: a module without weights that takes its JSON
out of the state dict while it loads, and writes it when it is saved (QUANTIZATION.md, "Diffusion attention
preferences").
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.makers.save import save
from support import flux

pytestmark = pytest.mark.parity

BLOCK = "single_blocks.1"
NAME = f"{BLOCK}.comfy_attention.config"
WANTED = [{"attention": "comfy_kitchen_sol", "tau": 0.5}, {"attention": "comfy_kitchen_int8"}]


class ComfyAttention(torch.nn.Module):
    config = None

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        stored = state_dict.pop(f"{prefix}config", None)
        self.config = None if stored is None else json.loads(stored.numpy().tobytes())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config is not None:
            destination[f"{prefix}config"] = as_tensor(self.config)


def as_tensor(conf) -> torch.Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


@pytest.fixture
def knowing_host(monkeypatch):
    from comfy.ldm.flux.layers import SingleStreamBlock

    before = SingleStreamBlock.__init__

    def made(self, *args, **kwargs):
        before(self, *args, **kwargs)
        self.comfy_attention = ComfyAttention()

    monkeypatch.setattr(SingleStreamBlock, "__init__", made)


def load(reference, **request):
    return model.load(model.Request(str(reference), **request), quiet=True)


@pytest.fixture(scope="module")
def file(tiny, output, tmp_path_factory):
    """A natively named FP8 file, with the prefix that many have and one preference."""
    saved, _ = save(load(tiny.fp8).patcher, "plain", "exact", step=lambda n: None)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(saved).items()}
    made = tmp_path_factory.mktemp("files") / "preferring.safetensors"
    save_file(tensors | {f"model.diffusion_model.{NAME}": as_tensor(WANTED)}, str(made))
    return made


def run(patcher):
    return flux.comfy_velocity(patcher, **flux.inputs())


def kept(patcher) -> object:
    return patcher.model.diffusion_model.get_submodule(f"{BLOCK}.comfy_attention").config


def test_inspect_names_it(file):
    report = describe_report(describe(Checkpoint(locate(str(file)))))
    assert "this checkpoint loads" in report
    assert "attention preferences: comfy_kitchen_sol or comfy_kitchen_int8 in 1 modules " \
           f"(model.diffusion_model.{BLOCK})" in report


def test_it_reaches_the_host_and_the_saved_file(file, tiny, output, knowing_host):
    loaded = load(file)
    assert kept(loaded.patcher) == WANTED and "takes no attention preferences" not in loaded.report
    assert torch.equal(run(loaded.patcher), run(load(tiny.fp8).patcher))
    path, _ = save(loaded.patcher, "again", "exact", step=lambda n: None)
    with safe_open(str(path), "pt") as content:
        assert json.loads(bytes(content.get_tensor(NAME).tolist())) == WANTED
    assert kept(load(path).patcher) == WANTED


def test_where_the_host_has_no_place_for_it(file, tiny, tmp_path):
    """On hosts that do not know it, and in a module that is not there on any."""
    tensors = load_file(str(file))
    tensors["model.diffusion_model.nowhere.comfy_attention.config"] = tensors.pop(f"model.diffusion_model.{NAME}")
    save_file(tensors, str(tmp_path / "nowhere.safetensors"))
    loaded = load(tmp_path / "nowhere.safetensors")
    assert "note: this ComfyUI takes no attention preferences of model files, or not these" in loaded.report
    assert torch.equal(run(loaded.patcher), run(load(tiny.fp8).patcher))


@pytest.mark.parametrize("stored", [torch.ones(4), torch.tensor(list(b"{"), dtype=torch.uint8), as_tensor("sage"),
                                    as_tensor([])])
def test_what_is_none_is_refused(file, stored, tmp_path):
    tensors = load_file(str(file)) | {f"model.diffusion_model.{NAME}": stored}
    save_file(tensors, str(tmp_path / "bad.safetensors"))
    with pytest.raises(CheckpointError, match="is no attention preference"):
        load(tmp_path / "bad.safetensors")


def test_in_diffusers_names_it_is_left_out(tiny, tmp_path):
    tensors = load_file(str(next(tiny.fp8.glob("*.safetensors")))) | {
        "single_transformer_blocks.1.attn.comfy_attention.config": as_tensor(WANTED)}
    save_file(tensors, str(tmp_path / "named.safetensors"))
    loaded = load(tmp_path / "named.safetensors")
    assert "left out, because in diffusers names" in loaded.report
    assert torch.equal(run(loaded.patcher), run(load(tiny.fp8).patcher))


def test_a_patch_goes_along_with_an_override(tiny, output, knowing_host):
    """A LoRA file's preference becomes an object patch of the host's, which holds on to no weights."""
    base, preferring = load(tiny.bf16).patcher, ComfyAttention()
    preferring.config = WANTED
    base.add_object_patch(f"diffusion_model.{BLOCK}.comfy_attention", preferring)
    assert host.bound_to_weights(base) == ""
    result = model.override(base, model.Request(str(tiny.fp8))).patcher
    assert torch.equal(run(result), run(load(tiny.fp8).patcher))
    path, _ = save(result, "patched", "exact", step=lambda n: None)
    with safe_open(str(path), "pt") as content:
        assert json.loads(bytes(content.get_tensor(NAME).tolist())) == WANTED
    base.add_object_patch(f"diffusion_model.{BLOCK}.linear1", torch.nn.Identity())
    assert f"patched modules (diffusion_model.{BLOCK}.linear1)" in host.bound_to_weights(base)


def test_a_model_without_memory(tiny, knowing_host):
    """JSON of which there are no bytes is not handed to the host, which would read them."""
    native = {name: torch.empty_like(tensor, device="meta")
              for name, tensor in load(tiny.bf16).patcher.model.diffusion_model.state_dict().items()}
    patcher = host.load_without_memory(native | {NAME: torch.empty(9, dtype=torch.uint8, device="meta")}, options={})
    assert kept(patcher) is None and all(p.is_meta for p in patcher.model.diffusion_model.parameters())

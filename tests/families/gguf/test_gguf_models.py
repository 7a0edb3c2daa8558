"""GGUF files of every model that the host knows: each parameter is what stock ComfyUI loads of the numbers in the file."""

from __future__ import annotations

import pytest
import torch

from support import host_models
from support.gguf_files import blocks, packed, write
from support.host_sizes import MODELS
from support.real_files import load

# The names of parameters from which llama.cpp's tools cut a first dimension of 1 (specs of ComfyUI-GGUF's converter).
CUT = ("modulation", "emb_pos", "pos_embed")


def parameters(patcher) -> dict[str, torch.Tensor]:
    return {name: (tensor.dequantize() if hasattr(tensor, "dequantize") else tensor).float()
            for name, tensor in patcher.model.diffusion_model.named_parameters()}


@pytest.mark.part(3)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter(tmp_path, name):
    import comfy.sd

    tensors = host_models.make(name)
    made, truth = packed(tensors, ("Q8_0", "Q4_1"))
    for key, tensor in made.items():
        if key.rpartition(".")[2] in CUT and not isinstance(tensor, tuple) and tensor.ndim == 3 and tensor.shape[0] == 1:
            made[key] = tensor[0]
    header = host_models.metadata_of(name)
    with host_models.detected(name):
        stock = comfy.sd.load_diffusion_model_state_dict(
            {key: t.clone() for key, t in truth.items()}, model_options={"dtype": torch.float32}, metadata=header or None)
        loaded = load(write(tmp_path / "model.gguf", made, **{f"add_string:{k}": v for k, v in header.items()}))
        ours, wanted = parameters(loaded.patcher), parameters(stock)
    assert type(loaded.patcher.model) is type(stock.model) and ours.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(ours[key], wanted[key])]
    assert loaded.description.formats.keys() & {"GGUF Q8_0", "GGUF Q4_1"}


@pytest.mark.parametrize("name", ["SD 1", "SDXL Refiner"])
def test_convolutions(tmp_path, name):
    """ComfyUI-GGUF's converter stores a UNet's convolutions as [n / 256, 256] and their shape beside them (by 32 here,
    which is enough for Q8_0); stable-diffusion.cpp gives Linear weights trailing dimensions of 1."""
    import comfy.sd

    name = next(one for one in MODELS if one.startswith(name))
    tensors, shapes = host_models.make(name), {}
    made, truth = packed(tensors, "Q8_0")
    for key, tensor in tensors.items():
        if tensor.ndim == 4 and tensor.numel() % 32 == 0:
            raw, meant = blocks(tensor.reshape(-1, 32), "Q8_0")
            made[key], truth[key] = (raw, "Q8_0"), meant.view(tensor.shape)
            shapes[f"add_array:comfy.gguf.orig_shape.{key}"] = list(tensor.shape)
        elif key.endswith(("proj_in.weight", "proj_out.weight")) and tensor.ndim == 2:
            made[key] = tensor.half()[..., None, None]
            truth[key] = tensor.half().float()
    with host_models.detected(name):
        stock = comfy.sd.load_diffusion_model_state_dict({key: t.clone() for key, t in truth.items()},
                                                         model_options={"dtype": torch.float32})
        loaded = load(write(tmp_path / "model.gguf", made, "sdxl", **shapes))
        ours, wanted = parameters(loaded.patcher), parameters(stock)
    assert len(shapes) > 10 and ours.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(ours[key], wanted[key])]
    assert any("tensors in blocks are no weights of Linear layers" in note for note in loaded.description.notes)

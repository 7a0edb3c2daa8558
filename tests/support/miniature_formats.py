"""The miniature in every quantized form, made by what users make them with: nvidia-modelopt, comfy-kitchen, and the
tests' own packer of Nunchaku files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support import common, svdquant_models
from support.miniature import PROMPTS, SIZE

# The same layers in every format: the blocks. As published checkpoints do, ends and conditioning stay BF16.
KEEP = r"x_embedder|context_embedder|time_text_embed.*|proj_out|norm_out.*"


def modelopt(pipeline: Any, folder: Path, algorithm: str) -> Path:
    """The real nvidia-modelopt export ("FP8", "NVFP4") of a FluxPipeline's transformer, calibrated on its own prompts."""
    original = pipeline.transformer

    def draw(model: Any, seed: int) -> None:
        pipeline.transformer = model
        pipeline(list(PROMPTS), height=SIZE, width=SIZE, num_inference_steps=4, output_type="latent",
                 generator=torch.Generator().manual_seed(seed))

    try:
        return common.export(original, folder, draw, algorithm, [KEEP])
    finally:
        pipeline.transformer = original


def nunchaku(transformer: Any, folder: Path) -> Path:
    """An `svdq-int4` file of rank 16 with SVD low-rank branches, by the tests' packer."""
    made = svdquant_models.make_flux("int4", 16, model=transformer)
    return made.write(folder, name="svdq-int4_r16-miniature.safetensors")


def int8(native: dict[str, torch.Tensor], file: Path) -> Path:
    """ComfyUI's own `int8_tensorwise` file: weights of the blocks by comfy-kitchen, a scale a row; activations get a
    scale a token when it runs. `native` are all tensors under ComfyUI's names."""
    from comfy_kitchen.tensor import get_layout_class
    from safetensors.torch import save_file

    marker = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    tensors = {}
    for name, tensor in native.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.ndim == 2 and "_blocks." in name:
            codes, params = get_layout_class("TensorWiseINT8Layout").quantize(tensor.float(), per_channel=True)
            tensors |= {name: codes, f"{layer}.weight_scale": params.scale, f"{layer}.comfy_quant": marker.clone()}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(file))
    return file

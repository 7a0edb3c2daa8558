"""Language models as text encoders in tests: the pack's, and transformers' of them in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantized_transformers.loaders.components import text_encoder
from support import transformers_versions

# fp32 rounding (6e-8) over some hundred sums a layer; measured 2e-7 .. 9e-7
FORWARD = 1e-5


def load(folder: Path, *overrides: Path) -> Any:
    return text_encoder.load(text_encoder.Request(str(folder), overrides=tuple(map(str, overrides)))).clip


def reference(folder: Path) -> Any:
    """transformers' model, fp32; of a large one the BF16 tensors are made fp32 only while they are used."""
    import transformers

    name = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder / "text_encoder").eval()
    for parameter in model.parameters():  # transformers 4 makes them fp32
        parameter.data = parameter.data.bfloat16()
    model.requires_grad_(False)
    model.lm_head = torch.nn.Identity()  # nobody reads the logits
    if sum(p.numel() for p in model.parameters()) < 2e8:
        return model.float()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    large = {id(p) for block in lists for p in block.parameters()} | {id(model.get_input_embeddings().weight)}
    for parameter in model.parameters():
        if id(parameter) not in large:
            parameter.data = parameter.data.float()
    for block in (block for blocks in lists for block in blocks):
        block.register_forward_pre_hook(to_fp32)
        block.register_forward_hook(back)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.float())
    return model


def to_fp32(block: torch.nn.Module, _args: Any) -> None:
    for parameter in block.parameters():
        parameter.stored, parameter.data = parameter.data, parameter.data.float()


def back(block: torch.nn.Module, _args: Any, _out: Any) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.stored


def picture(width: int, height: int, seed: int) -> tuple[Any, torch.Tensor]:
    """The same picture for diffusers (PIL) and for the host (F32 [1, H, W, 3] in 0..1)."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels)[None].float() / 255


def fp32(kind: Any, folder: Path) -> Any:
    """Made in F32: one that was made BF16 keeps its angles, and Gemma's scale of embeddings, rounded."""
    return transformers_versions.loaded(kind, folder / "text_encoder", torch.float32).eval().requires_grad_(False)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

"""Synthetic FLUX.1 checkpoints of real width: headers without data, and FP8 twins for the bench."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def flux_modules(double: int, single: int, hidden: int, style: str = "diffusers") -> list:
    from quantized_transformers.loaders.architectures.base import Naming
    from quantized_transformers.loaders.architectures.flux1 import FLUX1

    dims = {"hidden": hidden, "in": 64, "out": 64, "text": 4096, "pooled": 768, "double": double, "single": single,
            "guidance": 1}
    return list(FLUX1.modules(dims, Naming(style, norm="weight" if style == "diffusers" else "scale")))


def flux_header(path: Path, double: int, single: int, hidden: int = 3072) -> int:
    """A sparse safetensors file with the header of an FP8 FLUX.1 of real width; returns its number of tensors."""
    header: dict[str, Entry] = {}
    at = 0

    def add(name: str, dtype: str, itemsize: int, *shape: int) -> None:
        nonlocal at
        size = itemsize
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size

    for module in flux_modules(double, single, hidden):
        for stored, rows in zip(module.stored, module.rows, strict=True):
            if not module.linear:
                add(f"{stored}.weight", "BF16", 2, rows)
                continue
            add(f"{stored}.weight", "F8_E4M3", 1, rows, module.inner[0])
            add(f"{stored}.weight_scale", "F32", 4)
            add(f"{stored}.input_scale", "F32", 4)
            add(f"{stored}.bias", "BF16", 2, rows)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return len(header)


def fp8_flux_twins(folder: Path, double: int, single: int, hidden: int = 3072) -> tuple[Path, Path]:
    """(diffusers FP8 folder, native FP8 file with ComfyUI markers) of the same sizes and formats, random codes.

    As ModelOpt's default export: every Linear FP8 but the two kinds of proj_out.
    """
    import torch
    from safetensors.torch import save_file

    def tensors_of(style: str) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for module in flux_modules(double, single, hidden, style):
            plain = module.native == "final_layer.linear" or module.native.endswith("linear2")
            for i, (stored, rows) in enumerate(zip(module.stored, module.rows, strict=True)):
                shape = (rows, *module.inner)
                if plain or not module.linear:
                    out[f"{stored}.{module.stored_leaf}"] = torch.randn(1).to(torch.bfloat16).expand(shape).contiguous()
                else:
                    out[f"{stored}.weight"] = torch.randint(0, 100, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
                    out[f"{stored}.weight_scale"] = torch.tensor(0.001 * (i + 1))
                    out[f"{stored}.input_scale"] = torch.tensor(0.01)
                    if style == "native":
                        marker = json.dumps({"format": "float8_e4m3fn"}).encode()
                        out[f"{stored}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
                if module.bias:
                    out[f"{stored}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
        return out

    ours, stock = folder / "fp8", folder / "native.safetensors"
    ours.mkdir()
    save_file(tensors_of("diffusers"), str(ours / "diffusion_pytorch_model.safetensors"))
    save_file(tensors_of("native"), str(stock))
    return ours, stock

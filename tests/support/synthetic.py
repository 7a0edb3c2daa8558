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


def flux_twins(folder: Path, double: int, single: int, kind: str = "FP8") -> tuple[Path, Path]:
    """(diffusers folder, native file with ComfyUI's markers) of FLUX.1's width, of the same sizes and formats, random
    codes: ModelOpt's exports for "FP8" and "NVFP4", whose q, k and v of an attention share a scale in the latter.

    As ModelOpt's default export in FP8: every Linear is quantized but the two kinds of proj_out; else those of the blocks
    alone, as published ones are.
    """
    from safetensors.torch import save_file

    def quantized(module: Any) -> bool:
        return not (module.native == "final_layer.linear" or module.native.endswith("linear2")
                    or kind != "FP8" and "_blocks." not in module.native)

    ours, stock = folder / kind.lower(), folder / f"native-{kind.lower()}.safetensors"
    ours.mkdir()
    save_file(_tensors(flux_modules(double, single, 3072), quantized, kind, False)[0], str(ours / "diffusion_pytorch_model.safetensors"))
    (ours / "config.json").write_text(json.dumps({
        "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": double, "num_single_layers": single,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
        "quantization_config": {"quant_method": "modelopt", "quant_algo": kind}}))
    save_file(_tensors(flux_modules(double, single, 3072, "native"), quantized, kind, True)[0], str(stock))
    return ours, stock


def wan_twins(folder: Path, layers: int) -> tuple[Path, Path]:
    """The same of Wan2.2 T2V A14B's width in msModelSlim's W8A8_DYNAMIC, which keeps the vendor's names: every Linear of the
    blocks."""
    from safetensors.torch import save_file

    from quantized_transformers.loaders.architectures.base import Naming
    from quantized_transformers.loaders.architectures.wan import Wan

    dims = {"hidden": 5120, "in": 16, "out": 16, "ffn": 13824, "layers": layers, "image": 0, "positions": 0}
    modules = list(Wan().modules(dims, Naming("native")))
    ours, stock = folder / "int8", folder / "native-int8.safetensors"
    ours.mkdir()
    tensors, quantized = _tensors(modules, lambda module: module.native.startswith("blocks."), "INT8", False)
    save_file(tensors, str(ours / "quant_model_weight_w8a8_dynamic.safetensors"))
    described = {name: "W8A8_DYNAMIC" if name.rpartition(".")[0] in quantized and not name.endswith(".bias") else "FLOAT"
                 for name in tensors}
    (ours / "quant_model_description_w8a8_dynamic.json").write_text(
        json.dumps({"model_quant_type": "W8A8_DYNAMIC", **described}))
    del tensors
    save_file(_tensors(modules, lambda module: module.native.startswith("blocks."), "INT8", True)[0], str(stock))
    return ours, stock


def _tensors(modules: list, wanted: Any, kind: str, native: bool) -> tuple[dict[str, Any], set[str]]:
    """(the tensors of these modules, the stored names of those that are quantized: Linears that are `wanted`)."""
    import torch

    out: dict[str, torch.Tensor] = {}
    names: set[str] = set()
    for module in modules:
        for i, (stored, rows) in enumerate(zip(module.stored, module.rows, strict=True)):
            shape = (rows, *module.inner)
            if module.linear and wanted(module):
                names.add(stored)
                out |= {f"{stored}.{leaf}": tensor for leaf, tensor in _quantized(kind, native, rows, module.inner[0], i).items()}
            else:
                out[f"{stored}.{module.stored_leaf}"] = torch.randn(1).to(torch.bfloat16).expand(shape).contiguous()
            if module.bias:
                out[f"{stored}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    return out, names


def _quantized(kind: str, native: bool, rows: int, columns: int, place: int) -> dict[str, Any]:
    """The tensors of a quantized layer, the `place`th of those that ComfyUI has as one."""
    import torch

    codes = torch.randint(0, 100, (rows, columns), dtype=torch.uint8)
    if kind == "INT8":
        leaves = {"weight": codes.view(torch.int8), "weight_scale": torch.full((rows, 1), 0.001)}
        leaves |= {} if native else {"weight_offset": torch.zeros(rows, 1)}
    else:
        leaves = {"input_scale": torch.tensor(0.01)}
        if kind == "FP8":
            leaves |= {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.001 * (place + 1))}
        else:
            blocks = (-(-rows // 128) * 128, -(-columns // 64) * 4) if native else (rows, columns // 16)
            leaves |= {"weight": codes[:, :columns // 2].contiguous(), "weight_scale_2": torch.tensor(0.001 * (1 + place // 3)),
                       "weight_scale": torch.randint(1, 100, blocks, dtype=torch.uint8).view(torch.float8_e4m3fn)}
    word = {"FP8": "float8_e4m3fn", "NVFP4": "nvfp4", "INT8": "int8_tensorwise"}[kind]
    marker = {"comfy_quant": torch.tensor(list(json.dumps({"format": word}).encode()), dtype=torch.uint8)}
    return leaves | (marker if native else {})

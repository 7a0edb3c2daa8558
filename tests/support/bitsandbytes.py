"""Layers as bitsandbytes stores them: those it made itself (tests/data/exports/bitsandbytes, see EXPORT), and whole
models in its formats, by its definitions and without the pack."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from support.pack import PACK

# Made on a CPU by bitsandbytes 0.50.2 with torch 2.13.0: its nn.Linear4bit and nn.Linear8bitLt around seeded random
# weights, `state_dict()` of each, and for each weight what its functional.dequantize_4bit or int8_vectorwise_dequant
# gives. Names say what is special; "storage" layers have another quant_storage, "across" ones blocks that cross rows: of
# these the weights are what its generic code gives (backends/default/ops.py, `_dequantize_4bit_compute`), as its kernel
# for AVX-512 reads such a block as if it began with the row (off by four times the error of the quantization).
EXPORT = PACK / "tests" / "data" / "exports" / "bitsandbytes"

Tensors = dict[str, torch.Tensor]


def export() -> tuple[Tensors, Tensors]:
    """(what bitsandbytes stored, what it dequantizes that to)."""
    return load_file(str(EXPORT / "layers.safetensors")), load_file(str(EXPORT / "expected.safetensors"))


def four_bits(weight: torch.Tensor, kind: str = "nf4", double: bool = False, block: int = 64) -> tuple[Tensors, torch.Tensor]:
    """(leaf -> tensor, the F32 weight that they mean) of a 4-bit layer, rounded to the nearest value of its table."""
    stored, _ = export()
    table = stored[f"{kind}.weight.quant_map"]
    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % block)).view(-1, block)
    absmax = flat.abs().amax(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    leaves = {"weight.absmax": absmax, "weight.quant_map": table}
    if double:
        levels, offset = stored["nf4_double.weight.nested_quant_map"], float(absmax.mean())
        rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer = rest.abs().amax(1)
        index = nearest(rest / outer.clamp(min=1e-30)[:, None], levels)
        leaves |= {"weight.absmax": index.flatten()[:len(absmax)].to(torch.uint8), "weight.nested_absmax": outer,
                   "weight.nested_quant_map": levels}
        absmax = (levels[index] * outer[:, None]).flatten()[:len(absmax)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    codes = nearest(flat / absmax.clamp(min=1e-30)[:, None], table)
    means = (table[codes] * absmax[:, None]).flatten()[:weight.numel()].view(weight.shape)
    codes = codes.flatten()[:weight.numel() + weight.numel() % 2].to(torch.uint8).view(-1, 2)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": codes[:, :1] << 4 | codes[:, 1:], **leaves, f"weight.quant_state.bitsandbytes__{kind}": text}, means


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Indices of the table's values that are nearest."""
    ordered, order = table.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


def llm_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The same of LLM.int8."""
    scale = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, \
        codes.float() * scale[:, None] / 127


def quantized(model: Any, layer: Callable[..., tuple[Tensors, torch.Tensor]], skip: tuple[str, ...] = (),
              **options: Any) -> Tensors:
    """What is stored of a diffusers model whose Linear layers are made by `layer`, but for names with one of `skip` in
    them; the model itself gets the weights that this means, and becomes F32."""
    model.float()
    stored = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(word in name for word in skip):
            leaves, means = layer(module.weight, **options)
            module.weight = torch.nn.Parameter(means, requires_grad=False)
            del stored[f"{name}.weight"]
            stored |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return stored

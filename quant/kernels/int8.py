"""INT8 products on a CPU. torch._int_mm is fast where the processor has instructions for it, and elsewhere a plain
loop, 20 to 80 times slower than a dense layer; sums of the same integers in F32 are as exact (ascend/integers.py)."""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..ascend import integers
from . import by_tiles


@cache
def has_instructions() -> bool:
    """Whether the processor multiplies INT8 faster by torch._int_mm: tried once, on a tenth of a millisecond's work."""
    a, b = torch.ones(32, 256, dtype=torch.int8), torch.ones(256, 256, dtype=torch.int8)

    def least(product: Any) -> float:
        times = []
        for _ in range(4):
            start = perf_counter()
            product(a, b)
            times.append(perf_counter() - start)
        return min(times)

    return least(torch._int_mm) <= least(integers.matmul)


def product(a: Tensor, b: Tensor) -> Tensor:
    """I8 [M, K] times I8 [K, N] -> I32 [M, N]."""
    if a.device.type == "cpu" and not has_instructions():
        return integers.matmul(a, b)
    from comfy_kitchen import mm_int8

    found: Tensor = mm_int8(a, b)
    return found


def takes(x: object, weight: Any) -> bool:
    """Whether the product of x with a weight in the host's INT8 layout is made here: comfy-kitchen copies the weight
    for each, transposed. Rotated activations stay its own."""
    import comfy_kitchen

    return by_tiles.is_plain(x) and not weight._params.convrot and hasattr(comfy_kitchen, "quantize_int8_rowwise")


def linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x [M, K] times a weight in the host's INT8 layout, plus bias, in x's dtype: by the rule of comfy-kitchen's eager
    int8_linear, and bit by bit what it gives."""
    from comfy_kitchen import quantize_int8_rowwise

    codes, scale = quantize_int8_rowwise(x)
    sums = product(codes, weight._qdata.t()).float()
    out = (sums * (scale.float() * weight._params.scale.float().reshape(1, -1))).to(x.dtype)
    return out if bias is None else out + bias.to(out.dtype)

"""Weights -> FP8 E4M3 with one scale a tensor (quant/codecs/fp8.py says how it is stored).

scale = amax / 448, code = e4m3(clamp(w / scale, +-448)), the division in F32 (docs/sources/sglang.md, "FP8 builder").
nvidia-modelopt divides in the weight's BF16, which gives some 2.5 % other codes; comfy-kitchen multiplies by a rounded
reciprocal. Torch casts what is beyond 464 to NaN, hence the clamp.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .blocks import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

MAX = 448.0


def scale_of(amax: float, maxbound: float = MAX) -> Tensor:
    """The F32 scale [1] of a tensor whose largest magnitude is `amax`: amax / maxbound, 1 for a tensor of zeros
    (what nvidia-modelopt exports for amax 0)."""
    import torch

    return (torch.tensor([amax or maxbound], dtype=torch.float32) / maxbound).clamp_(min=2.0 ** -149)


def quantize(weight: Tensor, scale: Tensor, out: Tensor | None = None, amax: float = math.inf) -> Tensor:
    """E4M3 codes of a float weight of any shape (finite, contiguous, on the CPU), into `out` when it is given.

    `amax` is a bound of its magnitudes, where one is known.
    """
    import torch

    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    work, factor = torch.empty(min(BLOCK, weight.numel()), dtype=torch.float32), scale.reshape(())
    clamp = not amax <= MAX * float(factor) * 1.01  # up to 464 is rounded to 448
    for part, codes in zip(weight.reshape(-1).split(BLOCK), out.view(-1).split(BLOCK), strict=True):
        values = work[:part.numel()]
        values.copy_(part)
        values.div_(factor)
        if clamp:
            values.clamp_(-MAX, MAX)
        codes.copy_(values)
    return out

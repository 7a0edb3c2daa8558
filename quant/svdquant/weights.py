"""The weights that SVDQuant's parts stand for, by definition (docs/sources/nunchaku.md, "Arithmetic")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import pad_rows, swap_nibbles, swizzle
from .parts import GROUP, SHIFT, Part


def residual(part: Part) -> Tensor:
    """The quantized weight without its low-rank pair, F32 [N, K]: (q * scales) / smooth, by definition."""
    if part.kind == "nvfp4":
        weight = _fp4_residual(part)
    else:
        pairs = torch.stack((part.codes & 15, part.codes >> 4), -1).view(part.rows, -1, GROUP[part.kind])
        codes = pairs.float() if part.kind == "awq" else (pairs ^ 8).float() - 8  # a two's complement nibble: -8..7
        codes *= part.scale.float().t()[..., None]
        if part.zeros is not None:
            codes += part.zeros.float().t()[..., None]
        weight = codes.view(part.rows, part.columns)
    if part.smooth is not None:
        weight /= part.smooth.float()
    return weight


def _fp4_residual(part: Part) -> Tensor:
    from comfy_kitchen import dequantize_nvfp4

    assert part.tensor_scale is not None
    weight = dequantize_nvfp4(pad_rows(swap_nibbles(part.codes)), part.tensor_scale.float(), swizzle(part.scale),
                              torch.float32)[:part.rows]
    if part.channel_scale is not None:
        weight = weight * part.channel_scale.float()[:, None]
    return weight


def plain_shift(weight: Tensor) -> Tensor:
    """What a plain matmul adds to the stored bias of an unsigned layer, F32 [N]
    (docs/sources/nunchaku.md, "Unsigned activations"): 0.171875 * rowsum(residual)."""
    return weight.sum(1) * SHIFT

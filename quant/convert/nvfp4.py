"""Weights -> NVFP4 in ModelOpt's byte order (quant/codecs/nvfp4.py says how it is stored).

The arithmetic is that of nvidia-modelopt's NVFP4QTensor, byte for byte (tested against it):

    scale_2 = amax / 2688                                     F32
    block   = e4m3(clamp(blockamax / (6 * scale_2), 2^-9, 448)), 1 for a block of zeros
    code    = e2m1(w / (block * scale_2)), ties to even, the sign that of the quotient

comfy-kitchen's quantize_nvfp4 divides in another order, stores 0 for blocks of zeros and keeps the sign of -0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .blocks import BLOCK

if TYPE_CHECKING:
    from torch import Tensor, dtype

GROUP = 16
MAX = 6.0 * 448.0
# Midpoints between neighbouring E2M1 magnitudes, and whether the upper code begins above or at them (ties to even).
_LIMITS = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))


def scale_of(amax: float) -> Tensor:
    """The F32 scale [] of a tensor whose largest magnitude is `amax`: amax / 2688, 1 for a tensor of zeros."""
    import torch

    return (torch.tensor(amax or MAX, dtype=torch.float32) / MAX).clamp_(min=2.0 ** -149)


def quantize(weight: Tensor, scale_2: Tensor, codes: Tensor | None = None,
             blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(U8 [rows, columns / 2], E4M3 [rows, columns / 16]) of a float weight [rows, columns], finite and on the CPU.

    Columns are padded with zeros to a multiple of 16. `codes` and `blocks` are filled when they are given.
    """
    import torch

    if weight.shape[-1] % GROUP:
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % GROUP))
    if weight.dtype not in (torch.bfloat16, torch.float16):
        weight = weight.float()
    rows, columns = weight.shape
    bounds = _bounds(float(scale_2), weight.dtype)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8) if codes is None else codes
    blocks = torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn) if blocks is None else blocks
    for part, code, block in zip(weight.reshape(-1).split(BLOCK), codes.view(-1).split(BLOCK // 2),
                                 blocks.view(-1).split(BLOCK // GROUP), strict=True):
        _quantize_block(part, scale_2, bounds, code, block)
    return codes, blocks


def _quantize_block(part: Tensor, scale_2: Tensor, bounds: Any, code: Tensor, block: Tensor) -> None:
    import numpy
    import torch

    signed = torch.int16 if part.element_size() == 2 else torch.int32
    bits = part.view(signed).numpy().view(bounds.dtype)
    # The first values of all groups beside each other, then the second ones, ...: what is done a group runs over them.
    stored = numpy.ascontiguousarray(bits.reshape(-1, GROUP).T)
    magnitudes = stored & bounds.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    scale = torch.from_numpy(magnitudes.max(0)).view(part.dtype).float().div_(6.0 * scale_2)
    scale[scale == 0] = 1.0
    block.copy_(scale.clamp_(2.0 ** -9, 448.0))
    rows = bounds.view(f"V{bounds.itemsize * 8}").reshape(-1)  # all bounds of a scale as one value
    whole = rows.take(block.view(torch.uint8).numpy())
    sign, *limits = numpy.ascontiguousarray(whole.view(bounds.dtype).reshape(-1, 8).T)
    nibbles = numpy.greater_equal(stored, sign).view(numpy.uint8)
    nibbles *= numpy.uint8(8)  # faster than a shift
    reached = numpy.empty(stored.shape, bool)
    for limit in limits:
        nibbles += numpy.greater_equal(magnitudes, limit, out=reached).view(numpy.uint8)
    packed = nibbles[1::2]
    packed *= numpy.uint8(16)
    packed |= nibbles[::2]
    for column, values in zip(code.view(-1, GROUP // 2).numpy().T, packed, strict=True):
        column[:] = values


@lru_cache(maxsize=8)
def _bounds(scale_2: float, dtype: dtype) -> Any:
    """Where codes begin, as bits of floats of `dtype`, for each E4M3 block scale under this tensor scale: [128, 8].
    Bits of magnitudes order as these do, so a weight's own bits tell its code, and nothing is divided.

    The first is of numbers with a sign: from there on the quotient is below zero. The others are of magnitudes, from
    where on it is in the next code. Found by halving with the very division that defines the code.
    """
    import torch

    signed = torch.int16 if dtype.itemsize == 2 else torch.int32
    divisors = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None] * scale_2
    limits, above = (torch.tensor(values) for values in zip((0.0, True), *_LIMITS, strict=True))
    low = torch.zeros(128, 8, dtype=torch.int64)
    high = torch.full_like(low, int(torch.tensor(float("inf"), dtype=dtype).view(signed)))
    while not torch.equal(low, high):
        middle = (low + high) // 2
        quotient = middle.to(signed).view(dtype).float() / divisors
        there = torch.where(above, quotient > limits, quotient >= limits)
        low, high = torch.where(there, low, middle + 1).minimum(high), torch.where(there, middle, high)
    high[:, 0] += 1 << 8 * dtype.itemsize - 1
    return high.numpy().astype(f"u{dtype.itemsize}")

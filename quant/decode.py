"""Codes to F32 on a CPU, in a few passes over what its caches hold: bit by bit what comfy-kitchen's eager decoding and
the codecs' definitions give, and 7 to 13 times as fast (`python3 dev.py bench`).

Everything writes into rows that are there already, a few at a time. A third of what a decoded weight costs otherwise is
the memory that it comes into.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

VALUES = 1 << 18  # decoded at once: F32 of them stay in a processor's cache
# The bits of E4M3 as those of F16, whose exponents count from 2^-14 instead of 2^-6. F16 has subnormal numbers that
# processors convert at full speed; as F32's, they would cost 150 cycles each, or be taken for zero.
_SHIFT, _MASK, _FACTOR = 7, 0xBF80 - (1 << 16), 2.0 ** 8
_LARGEST = 2.0 ** 119  # a scale below it can take the factor


def e4m3(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """F8_E4M3 [rows, columns] times an F32 scale of [], [rows, 1] or [rows, blocks of a row], into F32 `out`.

    A product by a power of two is exact, so bits * (scale * 2^8) is rounded as value * scale is. Rows with NaN, and
    scales that are too large for that, get the table of all codes.
    """
    step = _step(codes.shape[1])
    by_bits = bool(scale.numel()) and float(scale.abs().max()) < _LARGEST
    factors = scale * _FACTOR if by_bits else scale
    bits = torch.empty(min(step, len(codes)), codes.shape[1], dtype=torch.int16) if by_bits else codes
    for first in range(0, len(codes), step):
        part, made = codes[first:first + step], out[first:first + step]
        if by_bits and not _has_nan(part):
            half = bits[:len(part)].copy_(part.view(torch.int8)).bitwise_left_shift_(_SHIFT).bitwise_and_(_MASK)
            made.copy_(half.view(torch.float16))
            times(made, factors if scale.ndim == 0 else factors[first:first + step])
        else:
            looked_up(part.view(torch.uint8), _e4m3_table(), made)
            times(made, scale if scale.ndim == 0 else scale[first:first + step])


def _step(columns: int) -> int:
    """How many rows are decoded at once."""
    return max(VALUES // max(columns, 1), 1)


def _has_nan(codes: Tensor) -> bool:
    """Whether there are codes 0x7F or 0xFF, the largest signed and the largest unsigned one."""
    return int(codes.view(torch.int8).max()) == 127 or int(codes.view(torch.uint8).max()) == 255


def times(values: Tensor, scale: Tensor) -> None:
    """F32 values [rows, columns] times a scale of [], [rows, 1] or [rows, blocks of a row], in place."""
    if scale.ndim == 2 and scale.shape[1] > 1:
        values = values.unflatten(1, (scale.shape[1], -1))
        scale = scale.unsqueeze(-1)
    values.mul_(scale)


def looked_up(codes: Tensor, table: numpy.ndarray, out: Tensor, scale: Tensor | None = None) -> None:
    """What codes U8 [rows, n] mean by a table of 256 entries: F32 numbers, or pairs of them as F64, into F32 `out`;
    times a scale [rows, 1] or [rows, blocks of a row]."""
    import numpy as np

    found, step = out.numpy().view(table.dtype), _step(out.shape[1])
    for first in range(0, len(codes), step):
        np.take(table, codes[first:first + step].numpy(), out=found[first:first + step], mode="wrap")
        if scale is not None:
            times(out[first:first + step], scale[first:first + step])


@cache
def _e4m3_table() -> numpy.ndarray:
    found: numpy.ndarray = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    return found


def pairs(values: tuple[float, ...], *, low_first: bool) -> numpy.ndarray:
    """The table of a byte's two 4-bit codes, for `looked_up`: `values` are what the 16 codes mean."""
    import numpy as np

    codes, meant = np.arange(256), np.array(values, np.float32)
    halves = (codes & 15, codes >> 4)
    return np.stack([meant[half] for half in (halves if low_first else halves[::-1])], 1).view(np.float64).ravel()

"""Where NVFP4's codes begin, for each block scale, as bits of the weights' dtype."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, dtype

GROUP = 16
PAIRS = GROUP // 2
# Midpoints between neighbouring E2M1 magnitudes, and whether the upper code begins above or at them (ties to even).
_LIMITS = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))
_OCTAVE = 128  # from a BF16 number to its double


class Bounds(NamedTuple):
    """What tells the codes of weights of one dtype under one tensor scale.

    Magnitudes are bits shifted up by one, without the sign. A table has a row for each E4M3 block scale (its bits), the
    same number for all eight pairs of a group, as one value to be looked up.
    """

    word: Any  # numpy's unsigned integer of the dtype's size
    scale_2: float
    blocks: Any  # block scale (E4M3 bits) by the bits of a group's largest magnitude, for dtypes of 16 bits
    codes: tuple[Any, ...]  # from which magnitude on a code is at least 1, 2, ... 7
    nonzero: Any  # from which magnitude on a quotient is not 0; None where all are that are not 0 themselves
    octave: Any  # of BF16: where code 4 begins, an octave lower; further ones begin an octave apart
    within: Any  # how far above that code 3 begins, an octave lower
    regular: tuple[int, int]  # the first and the last block scale for which these two are as said


def block_scales(largest: Tensor, scale_2: float) -> Tensor:
    """E4M3 block scales of the largest magnitudes of groups."""
    import torch

    scale = largest.float().div_(6.0 * torch.tensor(scale_2, dtype=torch.float32))
    scale[scale == 0] = 1.0
    return scale.clamp_(2.0 ** -9, 448.0).to(torch.float8_e4m3fn)


@lru_cache(maxsize=8)
def bounds_of(scale_2: float, dtype: dtype) -> Bounds:
    """The bounds of weights of this dtype (BF16, F16 or F32) under this tensor scale."""
    import numpy as np
    import torch

    word = np.dtype(f"u{dtype.itemsize}")
    nonzero, *codes = bounds = _bounds(scale_2, dtype).T
    blocks = None
    if dtype.itemsize == 2:
        every = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
        blocks = block_scales(every, scale_2).view(torch.uint8).numpy()
    octave = within = np.zeros(128, np.int64)
    regular = 128, 127
    if dtype == torch.bfloat16:
        octave, within = codes[3] - _OCTAVE, codes[2] - (codes[3] - _OCTAVE)
        largest = np.zeros(128, np.int64)
        largest[blocks] = np.arange(1 << 15)
        fits = (within > 0) & (within < _OCTAVE) & (octave >= 0) & (largest < octave + 3 * _OCTAVE)
        for upper, lower in ((4, 2), (6, 4), (5, 3)):
            fits &= codes[upper] - codes[lower] == _OCTAVE
        regular = int(np.flatnonzero(~fits[:126]).max(initial=0)) + 1, 125
    tables = [_table(2 * bound, word) for bound in (*bounds, octave)]
    return Bounds(word, scale_2, blocks, codes=tuple(tables[1:8]), octave=tables[8],
                  nonzero=tables[0] if (nonzero[1:127] > 1).any() else None,
                  within=_table(2 * within, np.dtype(np.uint8)), regular=regular)


def _table(numbers: Any, word: Any) -> Any:
    import numpy as np

    return np.repeat(numbers.astype(word), PAIRS).view(f"V{PAIRS * word.itemsize}")


def _bounds(scale_2: float, dtype: dtype) -> Any:
    """Where quotients are not 0, and where the seven codes begin: bits of magnitudes [128, 8], int64. Found by halving
    with the very division that defines the code."""
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
    return high.numpy()

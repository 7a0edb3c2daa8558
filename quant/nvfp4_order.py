"""Whether NVFP4 block scales are in 128 x 4 tiles or row-major, told by their values.

In a real weight the scale of a block goes with its row and with its column: some outputs have large weights, some
inputs too. So an additive model of the scales' logarithms, one number a row and one a column, explains more of them in
the order that they are stored in than in the other. Both models have as many numbers, and of values without any such
structure (a tiny or random weight) they explain as much but for chance, whose size is known: the difference of two sums
of squares, each of chi-square distribution. `score` is the difference in units of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..host.texts import Text

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 12.0  # of a score that decides: chance gets beyond 6 once in 10 ** 9 files
TALL, WIDE = 128, 4  # a tile
BANDS = 2  # of 128 rows, of each weight


class Score(NamedTuple):
    """`difference` of what the two orders explain, in units of the residual's variance, positive for tiles; `freedom`:
    the numbers of each model."""

    difference: float = 0.0
    freedom: float = 0.0

    @property
    def value(self) -> float:
        """In standard deviations of chance."""
        return self.difference / math.sqrt(4 * self.freedom) if self.freedom else 0.0

    def __add__(self, other: object) -> Score:
        assert isinstance(other, Score)
        return Score(self.difference + other.difference, self.freedom + other.freedom)


def score(block: Tensor) -> Score:
    """What the scales of one weight, as stored, say: E4M3 [rows, columns], rows a multiple of 128 and columns of 4.

    A band of 128 rows is one stretch of bytes in either order.
    """
    import torch
    from comfy_kitchen.float_utils import from_blocked

    rows, columns = block.shape
    whole, bands = block.view(torch.uint8), rows // TALL
    found = Score()
    if columns <= WIDE:
        return found  # the orders differ by a permutation of rows only
    for band in sorted({i * bands // BANDS for i in range(BANDS)}):
        stored = whole[band * TALL:(band + 1) * TALL]
        both = [_logarithms(order) for order in (from_blocked(stored.contiguous(), TALL, columns), stored)]
        (tiled, rest), (linear, other) = map(_explained, both)
        variance = min(rest, other)
        if variance > 0:
            found += Score((tiled - linear) / variance, TALL + columns - 2)
    return found


def decide(scores: Iterable[Score]) -> tuple[bool | None, float]:
    """(whether the scales of a file are in tiles, the score of all); None where the values do not tell.

    Raises ValueError where some weights say one and some the other.
    """
    found = list(scores)
    total = sum(found, Score())
    if max((one.value for one in found), default=0.0) > MARGIN and min(one.value for one in found) < -MARGIN:
        raise ValueError(Text("the block scales of some layers are in 128 x 4 tiles, those of others row-major"))
    return (total.value > 0 if abs(total.value) > MARGIN else None), total.value


def _logarithms(codes: Tensor) -> Tensor:
    """E4M3 bytes -> log2 of the values, of the smallest one for zero; F32."""
    import torch

    return codes.view(torch.float8_e4m3fn).float().abs().clamp(min=2.0 ** -9).log2()


def _explained(values: Tensor) -> tuple[float, float]:
    """(the sum of squares that rows and columns explain, the variance of the rest)."""
    rows, columns = values.shape
    values = values - values.mean()
    by_row, by_column = values.mean(1), values.mean(0)
    explained = columns * float(by_row.square().sum()) + rows * float(by_column.square().sum())
    rest = float(values.square().sum()) - explained
    return explained, rest / ((rows - 1) * (columns - 1))

"""Scales of rows and blocks as they are stored, for integers and FP8: which shapes there are, and one row by row.

Sizes of blocks are powers of two, and the last ones may be smaller, so shapes tell them: of `count` blocks over `size`
values each has as many as the smallest power of two that is no less than size / count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..host.texts import Text

if TYPE_CHECKING:
    from torch import Tensor


def block_of(size: int, count: int) -> int:
    """How many values each of `count` blocks over `size` values has, but for the last one; all for one block."""
    return size if count == 1 else 1 << (-(-size // count) - 1).bit_length()


def shape_problem(shape: tuple[int, ...], rows: int, columns: int) -> str:
    """What is wrong with a scale of this shape for a [rows, columns] weight: it is one value, one a row ([rows] or
    [rows, 1]), or one a block ([blocks of rows, blocks of columns], possibly with a dimension of one behind each)."""
    if shape in ((), (1,), (1, 1), (rows,)):
        return ""
    cut = _blocks(shape)
    if len(cut) == 2 and all(cut) and all(
            count == -(-size // block_of(size, count)) for size, count in zip((rows, columns), cut, strict=True)):
        return ""
    return Text("the scale is {shape}, expected one value, one a row, or one a block of a power of two of rows and "
                "columns", shape=list(shape))


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a dimension of one behind the last (converters) or behind each (ModelOpt's FP8_PB_WO)."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[::2]
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def positive(name: str, scale: Tensor) -> Tensor:
    """A scale in F32. Raises ValueError for values that are not finite and positive; `name` is the tensor's."""
    scale = scale.float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(Text("{name} has values that are not finite and positive", name=name))
    return scale


def by_row(name: str, scale: Tensor, rows: int) -> Tensor:
    """A stored scale of a right shape -> F32 [rows, blocks of a row]. Raises ValueError for values that are not finite
    and positive; `name` is the tensor's."""
    scale = positive(name, scale)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1).contiguous()
    if scale.ndim == 1:
        return scale.reshape(rows, 1)
    scale = scale.reshape(_blocks(tuple(scale.shape)))
    if scale.shape[0] == rows:
        return scale
    return scale.repeat_interleave(block_of(rows, scale.shape[0]), 0)[:rows].contiguous()

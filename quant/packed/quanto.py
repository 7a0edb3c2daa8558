"""optimum-quanto's integers of 2 and 4 bits: weights alone, in groups of whole rows or of as many columns.

N rows, K columns, C columns of a group, M = N K / C groups row by row, p = 8 // bits codes a byte.

    weight         U8 [ceil(M / p), C]   quanto's weight._data._data: of the groups one below the other, the first
                                         ceil(M / p) in the lowest bits, the next ones above them, and so on
    weight_scale   float [M, 1]          quanto's weight._scale
    weight_shift   float [M, 1]          quanto's weight._shift, subtracted at the end; U8 or I8: a zero point
    input_scale, output_scale   float [] 1 where it does not quantize activations

W = code * weight_scale - weight_shift, or (code - weight_shift) * weight_scale. Nothing of it tells N: the bias does.
Source: optimum/quanto/tensor/packed.py, grouped.py, qbits.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text
from ..codecs.groups import tile
from ..stored import ByteOrder, Leaves
from ..tile import Coded
from .bits import FLOATS, IntegerFormat, shapes_problem
from .rows import output_scale

if TYPE_CHECKING:
    from torch import Tensor


def format_of(leaves: Leaves) -> Quanto | str:
    """The format of a layer with weight, weight_scale and weight_shift, or why it cannot be read."""
    weight, scale = tuple(leaves["weight"].shape), tuple(leaves["weight_scale"].shape)
    fits = [bits for bits in (2, 4) if len(weight) == len(scale) == 2 and weight[0] == -(-scale[0] * bits // 8)]
    if len(fits) != 1:
        return Text("codes {codes} for scales {scales}, which are neither 2 nor 4 bits", codes=list(weight),
                    scales=list(scale))
    if "bias" not in leaves:
        return Text("codes of {bits} bits without a bias, and nothing else tells the number of rows", bits=fits[0])
    return Quanto(fits[0], leaves["bias"].shape[0] if leaves["bias"].shape else 0)


class Quanto(IntegerFormat):
    """See the module. `rows`: of the weight."""

    def __init__(self, bits: int, rows: int) -> None:
        super().__init__(bits, "weight_scale", "weight_shift", "output_scale", "input_scale")
        self.rows = rows

    def shape(self, leaves: Leaves) -> tuple[int, int] | None:
        """[rows, columns] of the weight, where they make whole groups."""
        groups, size = leaves["weight_scale"].shape[0], leaves["weight"].shape[1]
        return (self.rows, groups // self.rows * size) if self.rows and groups % self.rows == 0 else None

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        size = leaves["weight"].shape[1]
        if not size or columns % size:
            return Text("groups of {size} columns over {columns} columns", size=size, columns=columns)
        groups = rows * columns // size
        return shapes_problem(leaves, {
            "weight": ("U8", (-(-groups * self.bits // 8), size)), "weight_scale": (FLOATS, (groups, 1)),
            "weight_shift": ((*FLOATS, "I8", "U8"), (groups, 1)), "output_scale": (FLOATS, ()),
            "input_scale": (FLOATS, ())})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        output_scale(name, part)
        groups, size = part["weight_scale"].shape[0], part["weight"].shape[1]
        mask = (1 << self.bits) - 1
        codes = torch.cat([part["weight"] >> shift & mask for shift in range(0, 8, self.bits)])[:groups]
        scale, shift = (part[leaf].reshape(self.rows, -1) for leaf in ("weight_scale", "weight_shift"))
        floats = shift.dtype.is_floating_point
        made = tile(name, codes.reshape(self.rows, -1), scale, bits=self.bits, size=size,
                    zero=None if floats else shift, offset=-shift.float() if floats else None)
        return Coded((made,), part.get("bias"))

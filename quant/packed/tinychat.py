"""TinyChat's 4-bit integers, as Nunchaku's T5 has them (awq-int4-flux.1-t5xxl): weights alone, four rows interleaved.

N rows, K columns, groups of 128 columns, their number G rounded up to a multiple of 8.

    weight         I16 [N / 4, K]   stands for qweight: of four rows and 64 columns at a time, 16 words a row; a word
                                    has columns i, i + 8, i + 16 and i + 24 of 32 in its nibbles, lowest first
    scales         float [G, N]
    scaled_zeros   float [G, N]     added at the end

W = code * scale + scaled_zero. Source: nunchaku's models/text_encoders/tinychat_utils.py (pack_w4,
convert_to_tinychat_w4x16y16_linear_weight) and linear.py (W4Linear).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text
from ..codecs.groups import tile
from ..stored import ByteOrder, Leaves
from ..tile import Coded
from .bits import FLOATS, IntegerFormat, shapes_problem

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128


class TinyChat(IntegerFormat):
    """See the module."""

    def __init__(self) -> None:
        super().__init__(4, "scales", "scaled_zeros")

    def shape(self, leaves: Leaves) -> tuple[int, int]:
        """[rows, columns] of the weight."""
        quarter, columns = leaves["weight"].shape
        return 4 * quarter, columns

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if rows % 4 or columns % GROUP:
            return Text("a weight of {shape}, which is not stored in four rows and {columns} columns at a time",
                        shape=[rows, columns], columns=GROUP)
        groups = -(-columns // GROUP // 8) * 8
        return shapes_problem(leaves, {"weight": ("I16", (rows // 4, columns)), "scales": (FLOATS, (groups, rows)),
                                       "scaled_zeros": (FLOATS, (groups, rows))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        codes = unpack(part["weight"])
        groups = codes.shape[1] // GROUP
        scale, offset = (part[leaf][:groups].t() for leaf in ("scales", "scaled_zeros"))
        return Coded((tile(name, codes, scale, bits=4, offset=offset, size=GROUP),), part.get("bias"))


def unpack(words: Tensor) -> Tensor:
    """Words I16 [N / 4, K] -> codes 0 to 15, U8 [N, K]."""
    import torch

    quarter, columns = words.shape
    words = words.view(quarter, columns // 64, 4, 16).transpose(1, 2).reshape(4 * quarter, columns // 32, 1, 8)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device).view(4, 1)
    return (words >> shifts & 15).to(torch.uint8).reshape(4 * quarter, columns)

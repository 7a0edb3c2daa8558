"""GPTQ, AWQ, and what AutoRound writes in either's layout: a Linear's tensors, transposed against nn.Linear.

"weight" stands for qweight. N rows, K columns, G groups, b bits.

    GPTQ   weight I32 [K b / 32, N], packed along K; qzeros I32 [G, N b / 32], along N; lowest bits first, and 3 bits
           run on across words; scales float [G, N]; g_idx I32 [K], the group of every column (AutoRound leaves it out)
    AWQ    weight I32 [K, N / 8], qzeros I32 [G, N / 8], packed along N: row 8 j + i is in
           nibble NIBBLES[i] of word j (quant/codecs/words.py); scales float [G, N]

W = (code - zero) * scale. Version 1 of GPTQ ("gptq", the usual) stores zero points less one, version 2 ("gptq_v2") as
they are. gptqmodel (utils/model.py) subtracts 0x11111111 from the whole word, so borrows run through it, and it is
undone on the word; with 3 bits it does each code by itself, modulo 8 (utils/model_dequant.py). AWQ: autoawq's
utils/packing_utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text
from ..codecs.groups import tile
from ..codecs.words import as_stored, awq_codes
from ..stored import ByteOrder, Leaves
from ..tile import Coded
from .bits import FLOATS, WORD, IntegerFormat, shapes_problem, unpack

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)  # gptqmodel's others are in planes, which is another layout


def is_awq(leaves: Leaves) -> bool:
    """Whether a layer with qweight and scales is packed as AWQ's are, by its shapes."""
    weight, scales = leaves["weight"], leaves["scales"]
    return len(weight.shape) == len(scales.shape) == 2 and scales.shape[1] == 8 * weight.shape[1]


def bits_of(leaves: Leaves) -> int:
    """GPTQ's bits a code, by the shapes of its zero points; 0 for none that there are."""
    zeros, scales = leaves["qzeros"], leaves["scales"]
    two = len(zeros.shape) == len(scales.shape) == 2 and scales.shape[1]
    bits = WORD * zeros.shape[1] // scales.shape[1] if two else 0
    return bits if bits in BITS else 0


def group_size(columns: int, groups: int, declared: int) -> int:
    """Columns of a group: as declared where that makes as many, else as the shapes tell; 0 for neither."""
    if declared > 0 and -(-columns // declared) == groups:
        return declared
    return columns // groups if groups and columns % groups == 0 else 0


class GPTQ(IntegerFormat):
    """`version` is 1 or 2, or 0: it is told by zero points that are all the same, as symmetric weights have them.
    `size`: columns of a group as declared, if they are."""

    def __init__(self, bits: int, version: int, size: int) -> None:
        super().__init__(bits, "qzeros", "scales", "g_idx")
        self.version, self.size = version, size
        if bits in (4, 8):
            self.codec = f"u{bits}_gptq"

    def shape(self, leaves: Leaves) -> tuple[int, int]:
        """[rows, columns] of the weight."""
        words, rows = leaves["weight"].shape
        return rows, words * WORD // self.bits

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        groups = leaves["scales"].shape[0]
        if not group_size(columns, groups, self.size) and "g_idx" not in leaves:
            return Text("{groups} groups over {columns} columns, and no g_idx or group_size tells which", groups=groups,
                        columns=columns)
        return shapes_problem(leaves, {
            "weight": ("I32", (columns * self.bits // WORD, rows)), "scales": (FLOATS, (groups, rows)),
            "qzeros": ("I32", (groups, rows * self.bits // WORD)), "g_idx": ("I32", (columns,))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        words, scale, zero = part["weight"], part["scales"], self._zeros(name, part["qzeros"])
        columns = words.shape[0] * WORD // self.bits
        group, size = part.get("g_idx"), group_size(columns, scale.shape[0], self.size)
        if self.bits in (4, 8):
            made = as_stored(name, self.codec, words, columns, scale, zero, group=group, size=size)
        else:
            codes = unpack(words, self.bits, 0, across=self.bits == 3).t()
            made = tile(name, codes, scale.t(), bits=self.bits, zero=zero.t(), group=group, size=size)
        return Coded((made,), part.get("bias"))

    def _zeros(self, name: str, words: Tensor) -> Tensor:
        import torch

        top, version = (1 << self.bits) - 1, self.version
        if not version:
            first = unpack(words, self.bits, 1, across=self.bits == 3)
            version = next((number for number, value in ((1, top // 2), (2, top // 2 + 1))
                            if bool((first == value).all())), 0)
        if not version:
            raise ValueError(Text("{name}: asymmetric zero points, and nothing says whether they are version 1 or 2 of "
                                  "GPTQ (checkpoint_format)", name=name))
        if version == 1 and self.bits != 3:
            ones = sum(1 << i for i in range(0, WORD, self.bits))
            words = words + torch.tensor(ones, dtype=torch.int32)  # wraps around, as the subtraction did
        zeros = unpack(words, self.bits, 1, across=self.bits == 3)
        return zeros + 1 & top if version == 1 and self.bits == 3 else zeros


class AWQ(IntegerFormat):
    """AWQ's GEMM layout, of 4 bits. `size`: columns of a group as declared, if they are."""

    def __init__(self, size: int) -> None:
        super().__init__(4, "qzeros", "scales")
        self.size, self.codec = size, "u4_awq"

    def shape(self, leaves: Leaves) -> tuple[int, int]:
        """[rows, columns] of the weight."""
        columns, words = leaves["weight"].shape
        return words * 8, columns

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        groups = leaves["scales"].shape[0]
        if not group_size(columns, groups, self.size):
            return Text("{groups} groups over {columns} columns, and no group_size tells which", groups=groups,
                        columns=columns)
        return shapes_problem(leaves, {"weight": ("I32", (columns, rows // 8)), "scales": (FLOATS, (groups, rows)),
                                       "qzeros": ("I32", (groups, rows // 8))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        words, scale, zero = part["weight"], part["scales"], awq_codes(part["qzeros"])
        columns = words.shape[0]
        size = group_size(columns, scale.shape[0], self.size)
        if columns % 2:  # no whole bytes in a row
            made = tile(name, awq_codes(words).t(), scale.t(), bits=4, zero=zero.t(), size=size)
        else:
            made = as_stored(name, self.codec, words, columns, scale, zero, size=size)
        return Coded((made,), part.get("bias"))

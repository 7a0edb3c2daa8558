"""SDNQ: integers of 2 to 8 bits and FP8, with a low-rank pair where its SVD is on.

    weight       I8 or F8_E4M3 [N, K]; U8 [N, K] (uint8); with groups [N, G, K / G]; else in bytes, see WORDS: U8
                 [N K B / 8] flat (2 and 4 bits) or [words, bytes of a word] (3, 5, 6 and 7), intB as code + 2^(B-1)
    scale        float [N, 1] or [N, G, 1]
    zero_point   as scale, of unsigned types: a float that is ADDED
    svd_up, svd_down   float [N, r], [r, K]

W = code * scale + zero_point + svd_up @ svd_down (sdnq/dequantizer.py, packed_int/pack.py).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ...host.texts import Text
from ..codecs import fp8_blocks, int8
from ..codecs.groups import tile
from ..scales import block_of, positive
from ..stored import ByteOrder, Leaves
from ..tile import Coded, Place, Tile
from .bits import FLOATS, IntegerFormat, shapes_problem

if TYPE_CHECKING:
    from torch import Tensor

TYPES = (*(f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")), "float8_e4m3fn")
Word = tuple[tuple[tuple[int, int, int, int], ...], ...]


def _plain(count: int, bits: int) -> Word:
    return tuple(((byte, 0, bits, 0),) for byte in range(count))


# Bits -> the codes of a word of bytes in order, each in pieces: byte, lowest bit there, number of bits, lowest bit of
# the code. The first codes lie at the bottom of a byte each, and what is left of those holds the rest.
WORDS: dict[int, Word] = {
    2: tuple(((0, bit, 2, 0),) for bit in (0, 2, 4, 6)),
    3: (*_plain(3, 3), *(((byte, 3, 3, 0),) for byte in range(3)),
        ((0, 6, 2, 0), (2, 6, 1, 2)), ((1, 6, 2, 0), (2, 7, 1, 2))),
    4: (((0, 0, 4, 0),), ((0, 4, 4, 0),)),
    5: (*_plain(5, 5), ((0, 5, 3, 0), (3, 5, 2, 3)), ((1, 5, 3, 0), (4, 5, 2, 3)),
        ((2, 5, 3, 0), (4, 7, 1, 3), (3, 7, 1, 4))),
    6: (*_plain(3, 6), ((2, 6, 2, 0), (1, 6, 2, 2), (0, 6, 2, 4))),
    7: (*_plain(7, 7), tuple((6 - bit, 7, 1, bit) for bit in range(7))),
}


def bits_of(kind: str) -> int:
    """Bits of one of TYPES."""
    return int(kind.lstrip("uint")) if "int" in kind else 8


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes U8 of any shape -> codes U8 [number of codes], of 2 to 7 bits."""
    import torch

    word = WORDS[bits]
    data = packed.reshape(-1, len(word) * bits // 8)
    codes = torch.empty(len(data), len(word), dtype=torch.uint8, device=packed.device)
    for i, pieces in enumerate(word):
        codes[:, i] = sum((data[:, byte] >> low & (1 << count) - 1) << at for byte, low, count, at in pieces)
    return codes.flatten()


def format_of(leaves: Leaves, declared: str, others: frozenset[str]) -> SDNQ | str:
    """The format of a layer with weight and scale, or what is wrong with it. Bytes tell signed from unsigned and one
    layout from another, not 2 bits from 4 or 3 from 6: `declared` is the layer's type, `others` are those that the file
    has, one of which it is where the layer's own is not what the tensors are."""
    weight, shifted = leaves["weight"], "zero_point" in leaves
    kind = {"I8": "int8", "F8_E4M3": "float8_e4m3fn"}.get(weight.dtype, "")
    if weight.dtype == "U8":
        fits = {kind for kind in {declared, *others} if _fits(kind, leaves)}
        kind = declared if declared in fits else fits.pop() if len(fits) == 1 else ""
    if not kind or shifted is not kind.startswith("uint"):
        if shifted:
            return Text("{dtype} {shape} with zero_point is not {declared}, which is declared", dtype=weight.dtype,
                        shape=list(weight.shape), declared=declared)
        return Text("{dtype} {shape} without zero_point is not {declared}, which is declared", dtype=weight.dtype,
                    shape=list(weight.shape), declared=declared)
    return SDNQ(kind)


def _fits(kind: str, leaves: Leaves) -> bool:
    """Whether a weight in U8 may be of a type."""
    shape, rows, bits = tuple(leaves["weight"].shape), tuple(leaves["scale"].shape)[:1], bits_of(kind)
    if kind in ("int8", "float8_e4m3fn") or kind.startswith("uint") is not ("zero_point" in leaves):
        return False
    if bits == 8:
        return len(shape) > 1 and shape[:1] == rows
    return len(shape) == 1 if bits in (2, 4) else len(shape) == 2 and shape[1] == len(WORDS[bits]) * bits // 8


class SDNQ(IntegerFormat):
    """`kind` is one of TYPES."""

    def __init__(self, kind: str) -> None:
        super().__init__(bits_of(kind), "scale", "zero_point", "svd_up", "svd_down")
        self.kind = kind
        if kind == "int8":
            self.codec, self.name, self.colour = int8.FORMATS[1].codec, int8.FORMATS[1].name, int8.FORMATS[1].colour
        elif kind == "float8_e4m3fn":
            blocks = fp8_blocks.FORMATS[0]
            self.codec, self.name, self.colour = blocks.codec, blocks.name, blocks.colour

    def shape(self, leaves: Leaves) -> tuple[int, int] | None:
        """[rows, columns] of the weight, where its scale tells rows."""
        scale, count = leaves["scale"].shape, prod(leaves["weight"].shape) * 8 // self.bits
        return (scale[0], count // scale[0]) if scale and scale[0] and count % scale[0] == 0 else None

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        weight, scale = tuple(leaves["weight"].shape), tuple(leaves["scale"].shape)
        groups = scale[1] if len(scale) == 3 else 1
        if not groups or columns % groups:
            return Text("{groups} groups over {columns} columns", groups=groups, columns=columns)
        if self.kind == "float8_e4m3fn" and block_of(columns, groups) * groups != columns:
            return Text("{groups} groups of FP8 over {columns} columns, which this version does not load",
                        groups=groups, columns=columns)
        wanted: tuple[int, ...] = (rows, groups, columns // groups) if len(weight) == 3 else (rows, columns)
        if self.bits < 8:
            if rows * columns % len(WORDS[self.bits]):
                return Text("{kind} of {count} codes, which make no whole bytes", kind=self.kind, count=rows * columns)
            size = rows * columns * self.bits // 8
            wanted = (size,) if len(weight) == 1 else (size // weight[1], weight[1])
        if ("svd_up" in leaves) is not ("svd_down" in leaves):
            return Text("one of svd_up and svd_down, and they belong together")
        up = leaves.get("svd_up")
        rank = up.shape[-1] if up is not None and up.shape else 0
        scales = (rows, groups, 1) if len(scale) == 3 else (rows, 1)
        return shapes_problem(leaves, {
            "weight": (leaves["weight"].dtype, wanted), "scale": (FLOATS, scales), "zero_point": (FLOATS, scales),
            "svd_up": (FLOATS, (rows, rank)), "svd_down": (FLOATS, (rank, columns))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        rows = part["scale"].shape[0]
        scale, codes, offset = part["scale"].reshape(rows, -1), part["weight"], part.get("zero_point")
        codes = (codes if self.bits == 8 else unpack(codes, self.bits)).reshape(rows, -1)
        if self.bits == 8 and self.kind != "uint8":
            made = Tile(Place(self.codec, *codes.shape), {"codes": codes, "scale": positive(f"{name}.scale", scale)})
        else:
            zero = torch.full(tuple(scale.shape), float(1 << self.bits - 1)) if offset is None else None
            made = tile(name, codes, scale, bits=self.bits, zero=zero,
                        offset=None if offset is None else offset.reshape(rows, -1))
        if "svd_up" in part:
            made = made.having(up=part["svd_up"], down=part["svd_down"].t().contiguous())
        return Coded((made,), part.get("bias"))

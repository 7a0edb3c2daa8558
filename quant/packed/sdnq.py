"""SDNQ: integers of 4 and 8 bits and FP8, with a low-rank pair where its SVD is on.

    weight       I8 or F8_E4M3 [N, K]; U8 [N, K] (uint8); U8 [N K / 2] flat (int4, uint4), the first code in the low
                 nibble, int4 as code + 8; with groups [N, G, K / G] for the first three
    scale        F32 [N, 1] or [N, G, 1]
    zero_point   as scale, of unsigned types: a float that is ADDED
    svd_up, svd_down   float [N, r], [r, K]

W = code * scale + zero_point + svd_up @ svd_down (sdnq/dequantizer.py).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..codecs import fp8_blocks, int8
from ..codecs.groups import tile
from ..scales import block_of, positive
from ..stored import ByteOrder, Leaves
from ..tile import Coded, Place, Tile
from .bits import FLOATS, IntegerFormat, shapes_problem

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("int8", "uint8", "int4", "uint4", "float8_e4m3fn")


def format_of(leaves: Leaves) -> SDNQ | str:
    """The format of a layer with weight and scale, or what is wrong with it."""
    weight, shifted = leaves["weight"], "zero_point" in leaves
    if weight.dtype == "U8" and len(weight.shape) == 1:
        return SDNQ("uint4" if shifted else "int4")
    kind = {"I8": "int8", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}.get(weight.dtype)
    if kind is None or shifted is not (kind == "uint8"):
        return f"{weight.dtype} {list(weight.shape)} {'with' if shifted else 'without'} zero_point is no type of SDNQ's"
    return SDNQ(kind)


class SDNQ(IntegerFormat):
    """`kind` is one of TYPES."""

    def __init__(self, kind: str) -> None:
        super().__init__(4 if kind.endswith("int4") else 8, "scale", "zero_point", "svd_up", "svd_down")
        self.kind = kind
        if kind == "int8":
            self.codec, self.name, self.colour = int8.FORMATS[1].codec, int8.FORMATS[1].name, int8.FORMATS[1].colour
        elif kind == "float8_e4m3fn":
            blocks = fp8_blocks.FORMATS[0]
            self.codec, self.name, self.colour = blocks.codec, blocks.name, blocks.colour

    def shape(self, leaves: Leaves) -> tuple[int, int] | None:
        """[rows, columns] of the weight, where its scale tells rows."""
        scale, count = leaves["scale"].shape, prod(leaves["weight"].shape) * (2 if self.bits == 4 else 1)
        return (scale[0], count // scale[0]) if scale and scale[0] and count % scale[0] == 0 else None

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        weight, scale = tuple(leaves["weight"].shape), tuple(leaves["scale"].shape)
        groups = scale[1] if len(scale) == 3 else 1
        if not groups or columns % groups:
            return f"{groups} groups over {columns} columns"
        if self.kind == "float8_e4m3fn" and block_of(columns, groups) * groups != columns:
            return f"{groups} groups of FP8 over {columns} columns, which this version does not load"
        wanted = (rows * columns // 2,) if self.bits == 4 else \
            (rows, groups, columns // groups) if len(weight) == 3 else (rows, columns)
        if ("svd_up" in leaves) is not ("svd_down" in leaves):
            return "one of svd_up and svd_down, and they belong together"
        up = leaves.get("svd_up")
        rank = up.shape[-1] if up is not None and up.shape else 0
        scales = (rows, groups, 1) if len(scale) == 3 else (rows, 1)
        return shapes_problem(leaves, {
            "weight": (leaves["weight"].dtype, wanted), "scale": (FLOATS, scales), "zero_point": (FLOATS, scales),
            "svd_up": (FLOATS, (rows, rank)), "svd_down": (FLOATS, (rank, columns))})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        from ..ascend.mx import unpack

        rows = part["scale"].shape[0]
        scale, codes, offset = part["scale"].reshape(rows, -1), part["weight"], part.get("zero_point")
        codes = (unpack(codes) if self.bits == 4 else codes).reshape(rows, -1)
        if self.bits == 8 and self.kind != "uint8":
            made = Tile(Place(self.codec, *codes.shape), {"codes": codes, "scale": positive(f"{name}.scale", scale)})
        else:
            zero = torch.full(tuple(scale.shape), 8.0) if self.kind == "int4" else None
            made = tile(name, codes, scale, bits=self.bits, zero=zero,
                        offset=None if offset is None else offset.reshape(rows, -1))
        if "svd_up" in part:
            if not all(bool(part[leaf].isfinite().all()) for leaf in ("svd_up", "svd_down")):
                raise ValueError(f"{name}: svd_up or svd_down has values that are not finite")
            made = made.having(up=part["svd_up"], down=part["svd_down"].t().contiguous())
        return Coded((made,), part.get("bias"))

"""SVDQuant's 4-bit weights with a low-rank branch, and the AWQ weights beside them (quant/svdquant/parts.py has the
fields). NVFP4's codes and scales are in the host's order, everything else in the natural one.

Codecs that differ only in the activation are codecs of their own: that of "svdq_int4_unsigned" is shifted onto an
unsigned grid, and the bias that is stored is right for that.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..blocks import ceil_to
from ..scales import FINITE, NOT_NEGATIVE, POSITIVE
from ..svdquant.parts import CODEC, KIND
from ..tile import Tile
from . import nvfp4
from .base import FLOATS, Codec, Field

if TYPE_CHECKING:
    from torch import Tensor, dtype


def _up(value: int, step: int = 128) -> int:
    return ceil_to(value, step)


_LOW = {"down": Field(FLOATS, lambda rows, columns: (columns, -1), values=FINITE),
        "up": Field(FLOATS, lambda rows, columns: (rows, -1), 0, values=FINITE)}
_SMOOTH = {"smooth": Field(FLOATS, lambda rows, columns: (columns,), values=FINITE)}
_CODES = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // 2), 0)}
_GROUPS = {"scale": Field(FLOATS, lambda rows, columns: (columns // 64, rows), 1, values=FINITE)}
_FP4 = {"codes": Field(("uint8",), lambda rows, columns: (_up(rows, 16), columns // 2), 0),
        # unsigned in the kernels (PTX's ue4m3)
        "scale": Field(("float8_e4m3fn",), lambda rows, columns: (_up(rows), _up(columns // 16, 4)), 0,
                       values=NOT_NEGATIVE),
        "tensor_scale": Field(FLOATS, lambda rows, columns: (), values=POSITIVE),
        "channel_scale": Field(FLOATS, lambda rows, columns: (rows,), 0, optional=True, values=NOT_NEGATIVE)}
_ZEROS = {"zeros": Field(FLOATS, lambda rows, columns: (columns // 64, rows), 1, values=FINITE)}

_PACKED_LOW = {"down": Field(FLOATS, lambda rows, columns: (_up(columns), -1)),
               "up": Field(FLOATS, lambda rows, columns: (_up(rows), -1)),
               "smooth": Field(FLOATS, lambda rows, columns: (_up(columns),))}
_PACKED_CODES = {"codes": Field(("int8",), lambda rows, columns: (_up(rows), _up(columns) // 2))}
_PACKED_INT4 = {**_PACKED_CODES, **_PACKED_LOW,
                "scale": Field(FLOATS, lambda rows, columns: (_up(columns) // 64, _up(rows)))}
_PACKED_FP4 = {**_PACKED_CODES, **_PACKED_LOW,
               "scale": Field(("float8_e4m3fn",), lambda rows, columns: (-1, -1)),
               "tensor_scale": _FP4["tensor_scale"],
               "channel_scale": Field(FLOATS, lambda rows, columns: (_up(rows),))}
_PACKED_AWQ = {"codes": Field(("int32",), lambda rows, columns: (rows // 4, columns // 2)), **_GROUPS, **_ZEROS, **_LOW}


class SVDQuant(Codec):
    """See base.Codec and the module."""

    requantizes, feature = False, "SVDQuant"
    why = Text("4-bit codes with a low-rank branch")

    def __init__(self, name: str, title: str, fields: dict[str, Field], order: dict[str, Field] | None,
                 switch: str = "", unsigned: bool = False) -> None:
        self.name, self.title, self.fields, self.switch, self.shifts = name, title, fields, switch, unsigned
        self.orders = {} if order is None else {"nunchaku": order}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        from ..svdquant.packed import part_of
        from ..svdquant.weights import residual

        return residual(part_of(tile)).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        import torch

        from ..decode import each, looked_up, of_rows, times

        kind = KIND[self.name]
        if kind == "nvfp4":
            nvfp4.decode_rows(tile["codes"], tile["scale"], tile["tensor_scale"], first, last, out)
            if "channel_scale" in tile.fields:
                times(out, of_rows(tile["channel_scale"], first, last).float()[:, None])
        else:
            looked_up(of_rows(tile["codes"], first, last), _pairs(kind == "int4"), out,
                      of_rows(tile["scale"].t(), first, last).float())
            if "zeros" in tile.fields:
                each(torch.Tensor.add_, out, of_rows(tile["zeros"].t(), first, last).float())
        if "smooth" in tile.fields:
            each(torch.Tensor.div_, out, tile["smooth"].float())

    def natural(self, tile: Tile) -> Tile:
        if not tile.place.order:
            return tile
        from ..svdquant.packed import natural

        return natural(tile)

    def cut(self, tile: Tile, first: int, rows: int) -> Tile:
        raise ValueError(Text("rows of a layer in {format} cannot be taken alone", format=self.title))

    def swapped(self, tile: Tile) -> Tile:
        raise ValueError(Text("halves of a layer in {format} cannot be exchanged", format=self.title))

    def shift(self, residual: Tensor) -> Tensor | None:
        if not self.shifts:
            return None
        from ..svdquant.weights import plain_shift

        return plain_shift(residual)


@cache
def _pairs(signed: bool) -> Any:
    from ..decode import pairs

    return pairs(tuple(float(code - 16 * (signed and code > 7)) for code in range(16)), low_first=True)


_INT4 = {**_CODES, **_GROUPS, **_SMOOTH, **_LOW}
CODECS = (
    SVDQuant(CODEC["int4", False], "SVDQ INT4", _INT4, _PACKED_INT4),
    SVDQuant(CODEC["int4", True], "SVDQ INT4", _INT4, None, unsigned=True),
    SVDQuant(CODEC["nvfp4", False], "SVDQ NVFP4", {**_FP4, **_SMOOTH, **_LOW}, _PACKED_FP4, switch="nvfp4"),
    SVDQuant(CODEC["awq", False], "AWQ INT4", {**_CODES, **_GROUPS, **_ZEROS, **_LOW}, _PACKED_AWQ),
)

"""GGUF: ggml's block types, one codec each.

Stored per weight [rows, columns]: rows of blocks, each of 32, 64 or 256 values with their scales (quant/ggml). A tile
keeps the bytes as they lie in the file, so that rows can be cut, joined and moved without decoding. Nothing but ggml
quantizes most of these types, so patches stay beside the weight. Gathering rows, as an embedding does, decodes those
rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...host.texts import Text
from ..ggml import QUANTIZED, Type
from ..scales import FINITE
from ..tile import Tile
from .base import LOW_RANK, Codec, Damage, Field, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype

AT_ONCE = {"cpu": 1 << 18}  # values decoded at once: what stays in a processor's cache
ON_DEVICES = 1 << 24  # elsewhere: few launches, and a few times F32 of these beside the weight


class GGML(Codec):
    """See base.Codec and the module. "codes" are U8 [rows, bytes of a row]."""

    requantizes, deep = False, True
    listed = "GGUF"
    why = Text("blocks that only ggml has")

    def __init__(self, kind: Type) -> None:
        self.name, self.title, self.kind = f"ggml_{kind.name.lower()}", f"GGUF {kind.name}", kind
        self.fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // kind.block * kind.size), 0),
                       **LOW_RANK}

    def damage(self, tile: Tile) -> Damage | None:
        from ..ggml.damage import damage

        found = damage(tile["codes"], self.kind)
        return Damage("codes", found, FINITE) if found else super().damage(tile)

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        return decode(tile["codes"], self.kind, tile.place.columns, dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        from ..ggml.rows import decode_rows

        codes = tile["codes"][first:last]
        if not decode_rows(codes, self.kind, out):
            decode(codes, self.kind, tile.place.columns, out.dtype, out)

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


def codec_name(kind: str) -> str:
    """The codec of a ggml type."""
    return f"ggml_{kind.lower()}"


def decode(codes: Tensor, kind: Type, columns: int, dtype: dtype, out: Tensor | None = None) -> Tensor:
    """Blocks U8 [rows, bytes of a row] -> [rows, columns], computed in F32 and rounded once; into `out` where there is
    one.

    Raises ValueError for a type whose grid comes from gguf-py, where that is not installed.
    """
    import torch

    from ..ggml.blocks import BLOCKS
    from ..ggml.grids import GRIDS

    numbers = BLOCKS.get(kind.name) or GRIDS[kind.name]
    rows = codes.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device) if out is None else out
    step = max(AT_ONCE.get(codes.device.type, ON_DEVICES) // max(columns, 1), 1)
    for first in range(0, rows, step):
        part = codes[first:first + step].reshape(-1, kind.size)
        out[first:first + step] = numbers(part).view(-1, columns)
    return out


CODECS = tuple(map(GGML, QUANTIZED.values()))

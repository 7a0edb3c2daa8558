"""4-bit codes into a table of 16 values, with a scale for every block of a row: bitsandbytes' NF4 and FP4.

    W = table[code] * scale            in F32, rounded once

A row's values lie two a byte, the first in the high nibble (bitsandbytes' functional.py, `dequantize_4bit`, and its
csrc/cpu_ops.cpp). bitsandbytes counts its blocks over the flattened weight: one that crosses rows is several here
(loaders/families/bitsandbytes.py), so that a tile can be cut between any rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ...host.texts import Text
from ..scales import FINITE
from ..tile import Tile
from .base import LOW_RANK, Codec, Field, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Codebook(Codec):
    """See base.Codec and the module. "codes" is U8 [rows, columns / 2], "scale" F32 [rows, blocks of a row], all of one
    size, "table" F32 [16]."""

    name, title, also = "codebook", "4-bit codebook", ("NF4", "FP4")
    requantizes = False
    fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // 2), 0),
              "scale": Field(("float32",), lambda rows, columns: (rows, -1), 0, values=FINITE),
              "table": Field(("float32",), lambda rows, columns: (16,), values=FINITE), **LOW_RANK}
    why = Text("codes into a table of 16 values")

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        import torch

        rows, columns, scale = tile.place.rows, tile.place.columns, tile["scale"]
        pairs = torch.cartesian_prod(tile["table"], tile["table"])  # of a byte's two values, the high nibble's first
        values = pairs[tile["codes"].int()].view(rows, scale.shape[1], columns // scale.shape[1])
        return (values * scale.unsqueeze(-1)).view(rows, columns).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        from ..decode import looked_up, of_rows

        table = _pairs(tile["table"].numpy().tobytes())
        looked_up(of_rows(tile["codes"], first, last), table, out, of_rows(tile["scale"], first, last))

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


@lru_cache(maxsize=16)
def _pairs(table: bytes) -> Tensor:
    """Of the F32 numbers in these bytes."""
    import numpy as np

    from ..decode import pairs

    return pairs(np.frombuffer(table, np.float32).tolist(), low_first=False)


CODECS = (Codebook(),)

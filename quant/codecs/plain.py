"""Weights that are not quantized, beside others that are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..tile import Tile
from .base import FLOATS, LOW_RANK, Codec, Field

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Plain(Codec):
    """See base.Codec: "codes" are the weight itself."""

    name = title = "plain"
    fields = {"codes": Field(FLOATS, lambda rows, columns: (rows, columns), 0), **LOW_RANK}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        return tile["codes"].to(dtype)

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        return like.having(codes=weight.to(like["codes"].dtype))


CODECS = (Plain(),)

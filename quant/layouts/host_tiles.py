"""Weights in the host's own layouts as tiles, for kernels that take those, too, and for files with low-rank pairs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..codecs import codecs
from ..tile import Tile

if TYPE_CHECKING:
    from ..codecs.base import Codec


def tile_of(weight: object, input_scale: Tensor | None = None) -> Tile | None:
    """A weight in a layout of the host's that a codec has, too, as a tile; None for any other. `input_scale` is what
    the layer has beside it."""
    if not isinstance(weight, QuantizedTensor) or getattr(weight._params, "transposed", False):  # not all layouts say
        return None
    return next((tile for kind in _kinds(weight._layout_cls)
                 if (tile := kind.of_host(weight, input_scale)) is not None), None)


@cache
def _kinds(layout: str) -> tuple[Codec, ...]:
    """The codecs whose numbers a layout of this name may hold: those that say so, or else those that name none."""
    kinds = [kind for kind in codecs().values() if kind.word]
    return tuple(kind for kind in kinds if kind.layout == layout) or tuple(kind for kind in kinds if not kind.layout)

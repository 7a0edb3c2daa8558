"""Weights in the host's own layouts of formats that Ascend has, as tiles, for kernels that take those too."""

from __future__ import annotations

import torch
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import QuantizedTensor

from ..ascend.kinds import BLOCK
from ..tile import Place, Tile
from .int8 import is_int8


def tile_of(weight: object) -> Tile | None:
    """A weight in the host's INT8 or MXFP8 layout as a tile, in views; None for any other."""
    if not isinstance(weight, QuantizedTensor) or getattr(weight._params, "transposed", False):  # not all layouts say
        return None
    data, p = weight._qdata, weight._params
    rows, columns = p.orig_shape
    if is_int8(weight) and not p.convrot:
        scale = p.scale.float().reshape(-1, 1).expand(rows, 1)
        return Tile(Place("w8a8_dynamic", rows, columns), {"codes": data, "scale": scale})
    if weight._layout_cls == "TensorCoreMXFP8Layout":
        blocks = -(-columns // BLOCK)
        scale = from_blocked(p.scale.view(torch.uint8), data.shape[0], data.shape[1] // BLOCK)[:rows, :blocks]
        return Tile(Place("w8a8_mxfp8", rows, columns), {"codes": data[:rows, :columns], "scale": scale})
    return None

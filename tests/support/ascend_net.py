"""Ascend layers in the host's operations, as a checkpoint load makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantized_transformers.quant.ascend.groups import BITS
from quantized_transformers.quant.ascend.kinds import KINDS
from quantized_transformers.quant.ascend.schemes import SCHEMES
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.tile import Tile


class Layer(NamedTuple):
    """What the host loads, and the tile that it was made of."""

    tensors: dict[str, torch.Tensor]
    layout: str
    rows: int
    columns: int
    tile: Tile
    notes: tuple[str, ...] = ()


def native(kind: str, part: dict[str, torch.Tensor], bias: bool | None = None, name: str = "p") -> Layer:
    """A layer of this type of a description -> what the host loads."""
    made = SCHEMES[kind].coded(name, dict(part), bias="bias" in part if bias is None else bias)
    tile, = made.tiles
    shape = (tile.place.rows, tile.place.columns)
    bias_leaf = {} if made.bias is None else {"bias": made.bias}
    if tile.place.codec == "plain":
        return Layer({"weight": tile["codes"], **bias_leaf}, "", *shape, tile, made.notes)
    done = join([tile], [name], shape)
    return Layer(done.tensors | bias_leaf, done.layout, *shape, tile, made.notes)


def dequantized(layer: Layer) -> torch.Tensor:
    """The weight of a layer in F32 [rows, columns], by its codec's definition."""
    return codec(layer.tile.place.codec).dequantize(layer.tile, torch.float32)


def operations(backend: str, dtype: torch.dtype = torch.float32, **options):
    """The host's mixed-precision operations with every kind, and integers with groups, multiplied by this kernel."""
    import comfy.ops

    return with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, **options),
                         dict.fromkeys((*KINDS, *BITS), backend))

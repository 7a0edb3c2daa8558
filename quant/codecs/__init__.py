"""What a weight's numbers mean: the registry of codecs (base.py says what one is)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ...host.texts import Text

if TYPE_CHECKING:
    from ..tile import Coded
    from .base import Codec

# Modules with CODECS.
MODULES = ("plain", "fp8", "fp8_blocks", "mxfp8", "nvfp4", "int8", "ascend", "svdquant", "ggml", "codebook", "groups",
           "words")


@cache
def codecs() -> dict[str, Codec]:
    """All codecs by name, imported when they are first needed: ComfyUI's start does without."""
    return {codec.name: codec for module in MODULES for codec in import_module(f".{module}", __name__).CODECS}


def codec(name: str) -> Codec:
    """A codec by its name. Raises ValueError for one that this version does not know."""
    found = codecs().get(name)
    if found is None:
        raise ValueError(Text("a codec {name!r}, which this version does not know", name=name))
    return found


def cut(layer: Coded, first: int, rows: int) -> Coded:
    """`rows` rows of a layer from `first` on, as a layer of its own; scales that all rows have in common stay as they
    are. Raises ValueError where a codec has no such rows alone."""
    tiles = []
    for tile in layer.tiles:
        place = tile.place
        start, end = max(first, place.row), min(first + rows, place.row + place.rows)
        if start < end:
            kind = codec(place.codec)
            alone = kind.cut(kind.natural(tile), start - place.row, end - start)
            tiles.append(alone.at(start - first, place.column))
    bias, delta = (None if tensor is None else tensor[first:first + rows] for tensor in (layer.bias, layer.delta))
    return layer._replace(tiles=tuple(tiles), bias=bias, delta=delta)

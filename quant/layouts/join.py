"""Tiles of one native Linear -> its native tensors.

Where the host's own layout has the same bytes it takes them (native first); else they go into this pack's layout, each
with its own scales. Nothing is requantized.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..codecs import codec
from ..marker import marker
from ..tile import Tile, check_tiling
from . import stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Native:
    """Native tensors of one module (leaf -> tensor) and how they came about, for the report. `layout` is what the
    marker says; `tiles` is how many there are, `own` are those of this pack's layout."""

    tensors: dict[str, Tensor]
    layout: str
    tiles: int = 1
    dynamic: bool = False
    notes: tuple[str, ...] = ()
    own: tuple[Tile, ...] = ()


def join(tiles: Sequence[Tile], names: Sequence[str], shape: tuple[int, int], *, full_precision: bool = False,
         own: Collection[str] = ()) -> Native:
    """Turn the tiles of a native Linear of this shape, at their places, into native tensors; `names` are the stored
    layers', for notes. At least one of them is quantized.

    `full_precision` asks for full-precision matmul. Codecs of `own` go into this pack's layout even where the host's
    would do, for other kernels than the host's. Raises ValueError for tiles that do not make the weight.
    """
    kinds = {tile.place.codec for tile in tiles}
    mixed = in_full_precision(kinds)
    full, notes = full_precision or mixed, list[str]()
    if mixed:
        notes.append(Text("partly quantized group, multiplied in full precision: {names}", names=", ".join(names)))
    static = True
    if any(codec(name).one_input for name in kinds):
        tiles, static, more = _one_input(tiles, names, mixed)
        notes += more
    word, made = _host(tiles, shape, full, own)
    kept: tuple[Tile, ...] = ()
    if made is None:
        tiles, word = _merged(tiles, shape), stored.FORMAT
        leaves = stored.named(tiles)[1]
        if len(leaves) > stored.MOST:
            raise ValueError(Text("{names} are one layer in ComfyUI, of {count} tensors; at most {most} are supported",
                                  names=", ".join(names), count=len(leaves), most=stored.MOST))
        made = {**leaves, "comfy_quant": marker(
            stored.conf_of(tiles) | ({"full_precision_matrix_mult": True} if full else {}))}
        kept = tuple(tiles)
    return Native(made, word, len(tiles), not static and not full, tuple(notes), kept)


def in_full_precision(kinds: Collection[str]) -> bool:
    """Whether a weight of tiles in these codecs is multiplied in full precision, because they are several of those that
    quantize the activation once for all, or such beside plain ones."""
    return len(kinds) > 1 and all(codec(name).one_input or name == "plain" for name in kinds)


def _one_input(tiles: Sequence[Tile], names: Sequence[str], mixed: bool) -> tuple[list[Tile], bool, list[str]]:
    """(the tiles with one activation scale in common or none, whether it is static, notes)."""
    import torch

    quantized = [tile for tile in tiles if codec(tile.place.codec).one_input]
    inputs = [tile["input_scale"] for tile in quantized if "input_scale" in tile.fields]
    static, notes, one = len(inputs) == len(quantized), list[str](), None
    if static and not mixed:  # a mixed group is multiplied in full precision
        one = inputs[0] if len(inputs) == 1 else torch.stack(inputs).max()
        if any(not torch.equal(scale, inputs[0]) for scale in inputs[1:]):
            notes.append(Text("different input scales in one group, the largest is used: {names}",
                              names=", ".join(names)))
    elif inputs and not mixed:
        notes.append(Text("input scale missing in a part of the group, dynamic for all of it: {names}",
                          names=", ".join(names)))
    joined = [tile.having(input_scale=one) if codec(tile.place.codec).one_input else tile for tile in tiles]
    return joined, static, notes


def _host(tiles: Sequence[Tile], shape: tuple[int, int], full: bool,
          own: Collection[str]) -> tuple[str, dict[str, Any] | None]:
    """(the format, the leaves) in the host's own layout, where it holds these tiles."""
    first = tiles[0].place
    kind = codec(first.codec)
    below = all(tile.place.codec == first.codec and not tile.place.order and tile.place.column == 0
                and tile.place.columns == shape[1] for tile in tiles)
    # Own tiles are not padded, so rows that the kernels would pad stay with the host's layout.
    kept = first.codec in own and not full and not any(tile.place.rows % 16 for tile in tiles)
    made = kind.host(tiles, full) if kind.word and below and not kept else None
    if made is not None:
        made["comfy_quant"] = marker({"format": kind.word, **kind.conf}
                                     | ({"full_precision_matrix_mult": True} if full else {}))
    return kind.word, made


def _merged(tiles: Sequence[Tile], shape: tuple[int, int]) -> list[Tile]:
    """The tiles, those that lie below each other and have one codec and one activation joined."""
    first = tiles[0].place
    if len(tiles) > 1 and all(t.place.codec == first.codec and t.place.columns == shape[1] for t in tiles):
        whole = codec(first.codec).merge(tiles)
        if whole is not None:
            return [whole]
    check_tiling([tile.place for tile in tiles], shape)
    return list(tiles)

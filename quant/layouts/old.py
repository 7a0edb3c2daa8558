"""Layers in the markers of version 0.1 (`qt.row_shards`, `qt.svdquant`, `qt.ascend.<kind>`) as tiles: read for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..tile import Place

if TYPE_CHECKING:
    from ..codecs.base import Seen
    from .stored import Described

ROW_SHARDS, SVDQUANT, ASCEND = "qt.row_shards", "qt.svdquant", "qt.ascend."  # the last: + kind
SHARD_LEAVES = tuple(f"weight_shard_{i}" for i in range(1, 4))  # rows after those of "weight"
BLOCK_LEAVES = tuple(f"weight_block_{i}" for i in range(4))  # block scales of NVFP4 shards
PARTS = ("codes", "scale", "zeros", "tensor_scale", "channel_scale", "smooth", "down", "up")
ASCEND_FIELDS = ("scale", "offset", "dual", "mul", "input_scale", "input_offset", "quant_bias", "bias")


def is_old(word: str) -> bool:
    """Whether a marker's format is one of these."""
    return word in (ROW_SHARDS, SVDQUANT) or word.startswith(ASCEND)


def described(conf: Mapping[str, Any], leaves: Mapping[str, Seen]) -> list[Described]:
    """The tiles of a layer with such a marker, whose leaves have these dtypes and shapes, as stored.described gives
    them. Raises ValueError for a marker or leaves that describe none."""
    word = str(conf.get("format"))
    try:
        if word == ROW_SHARDS:
            return _row_shards(leaves)
        return _svdquant(conf, leaves) if word == SVDQUANT else _ascend(leaves, word.removeprefix(ASCEND))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(Text("a {format} marker that does not list its parts: these tensors were not converted by "
                              "this pack; load the original file", format=word)) from error


def _row_shards(leaves: Mapping[str, Seen]) -> list[Described]:
    """weight, weight_shard_1.. (rows in order), weight_scale F32 [shards], weight_block_0.. for NVFP4 shards, and
    one input_scale or none."""
    names = {"float8_e4m3fn": "fp8", "uint8": "nvfp4"}
    tiles: list[Described] = []
    row = 0
    for i, leaf in enumerate(leaf for leaf in ("weight", *SHARD_LEAVES) if leaf in leaves):
        dtype, (rows, columns) = leaves[leaf]
        name = names.get(dtype, "plain")
        fields = {"codes": leaf}
        if name != "plain":
            fields |= {"block": BLOCK_LEAVES[i]} if name == "nvfp4" else {}
            fields["scale"] = f"weight_scale[{i}]"
            fields |= {"input_scale": "input_scale"} if "input_scale" in leaves else {}
        tiles.append((Place(name, rows, columns * (2 if name == "nvfp4" else 1), row), fields))
        row += rows
    scales = leaves["weight_scale"][1]
    if scales != (len(tiles),):
        raise ValueError(Text("weight_scale is {found}, expected {expected}", found=list(scales),
                              expected=[len(tiles)]))
    return tiles


def words_of_four(conf: Mapping[str, Any]) -> list[str]:
    """The leaves of I32 codes, which 0.1 saved as F8_E4M3 of four times the columns."""
    parts = conf.get("parts") if conf.get("format") == SVDQUANT else None
    return [_leaf("codes", i) for i, one in enumerate(parts if isinstance(parts, list) else ())
            if isinstance(one, dict) and one.get("kind") == "awq" and one.get("packed")]


def _svdquant(conf: Mapping[str, Any], leaves: Mapping[str, Seen]) -> list[Described]:
    """The parts that the marker lists: codes are "weight" and "weight_codes_1", the other fields of part i
    weight_<field>_<i>, but "weight_scale"."""
    from ..svdquant.parts import CODEC

    tiles: list[Described] = []
    for i, one in enumerate(conf["parts"]):
        place = Place(CODEC[one["kind"], bool(one.get("unsigned"))], one["rows"], one["columns"], one["row"],
                      one["column"], "nunchaku" if one.get("packed") else "", float(one.get("alpha", 1.0)))
        own = {field: _leaf(field, i) for field in PARTS}
        tiles.append((place, {field: leaf for field, leaf in own.items() if field == "codes" or leaf in leaves}))
    if not tiles:
        raise ValueError(Text("a {format} marker of no parts", format=SVDQUANT))
    return tiles


def _leaf(field: str, index: int) -> str:
    if index == 0 and field in ("codes", "scale"):
        return "weight" if field == "codes" else "weight_scale"
    return f"weight_{field}_{index}"


def _ascend(leaves: Mapping[str, Seen], kind: str) -> list[Described]:
    """weight, and weight_<field> of each of the codec's other fields."""
    from ..ascend.kinds import KINDS

    rows, columns = leaves["weight"][1]
    columns *= 2 if KINDS[kind].codec in ("int4", "mxfp4", "mxfp4_dual") else 1
    fields = {"codes": "weight", **{field: f"weight_{field}" for field in ASCEND_FIELDS if f"weight_{field}" in leaves}}
    return [(Place(kind, rows, columns), fields)]

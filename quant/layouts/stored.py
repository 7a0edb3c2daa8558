"""Tiles in a state dict, and so in files: `comfy_quant` says {"format": "qt.tiles", "tiles": [...]}, each tile its
codec, its place and which leaf of the layer is which of its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..codecs import codec
from ..codecs.base import AS_SAVED, Seen, problem
from ..tile import Place, Tile, check_tiling

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "qt.tiles"
MOST = 32  # tensors of a weight: the host moves as many as there are slots


def named(tiles: Sequence[Tile]) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """(for each tile its fields' leaves, leaf -> tensor). The first is "weight", the others weight_t<number>_<field>
    by the first tile that has it."""
    leaves: dict[str, Tensor] = {}
    known: dict[int, str] = {}
    fields = []
    for i, tile in enumerate(tiles):
        for name, tensor in tile.fields.items():
            leaf = known.setdefault(id(tensor), f"weight_t{i}_{name}" if leaves else "weight")
            leaves[leaf] = tensor
        fields.append({name: known[id(tensor)] for name, tensor in tile.fields.items()})
    return fields, leaves


def conf_of(tiles: Sequence[Tile]) -> dict[str, Any]:
    """What the marker of these tiles says."""
    usual = Place("", 0, 0)._asdict()
    return {"format": FORMAT, "tiles": [
        {**{key: value for key, value in tile.place._asdict().items() if value != usual[key]}, "fields": fields}
        for tile, fields in zip(tiles, named(tiles)[0], strict=True)]}


def as_saved(tensor: Tensor) -> Tensor:
    """Integers as floats of their size with the same bits: where layers are not in VRAM, the save nodes of ComfyUI 0.30
    make a Parameter of each tensor, which integers cannot be."""
    import torch

    word = AS_SAVED.get(str(tensor.dtype).removeprefix("torch."))
    return tensor.view(getattr(torch, word)) if word else tensor


# A tile as a marker describes it: its place, and field -> leaf; "leaf[2]" is the third value of a leaf.
Described = tuple[Place, Mapping[str, str]]


def described(conf: Mapping[str, Any]) -> list[Described]:
    """The tiles that a marker lists. Raises ValueError for one that lists none."""
    try:
        found: list[Described] = [
            (Place(**{key: value for key, value in one.items() if key != "fields"}), dict(one["fields"]))
            for one in conf["tiles"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(Text("a {format} marker that does not list its tiles: these tensors were not converted by "
                              "this pack; load the original file", format=FORMAT)) from error
    if not found:
        raise ValueError(Text("a {format} marker of no tiles", format=FORMAT))
    for place, fields in found:
        sizes = (place.rows, place.columns, place.row, place.column)
        if not all(type(size) is int and size >= 0 for size in sizes) or not isinstance(place.number, (int, float)) \
                or not all(isinstance(text, str) for text in (place.codec, place.order, *fields, *fields.values())):
            raise ValueError(Text("a {format} marker with a tile that is none: {place}", format=FORMAT, place=place))
    return found


def check(tiles: Sequence[Described], leaves: Mapping[str, Seen], shape: tuple[int, int]) -> None:
    """Raises ValueError for missing leaves, wrong dtypes or shapes, an unknown codec, and tiles that do not make a
    weight of this shape."""
    check_tiling([place for place, _ in tiles], shape)
    for place, fields in tiles:
        kind, seen = codec(place.codec), dict[str, Seen]()
        for field, leaf in fields.items():
            name, index = _index(leaf)
            if name not in leaves:
                raise ValueError(Text("{leaf} is missing", leaf=leaf))
            dtype, sizes = leaves[name]
            if index is not None and (not sizes or index >= sizes[0]):
                raise ValueError(Text("{name} is {shape}, too small for {leaf}", name=name, shape=list(sizes),
                                      leaf=leaf))
            seen[field] = dtype, sizes if index is None else sizes[1:]
        wrong = problem(place, seen, kind)
        if wrong:
            other = wrong.startswith("codes is") and "[" not in wrong
            if other:
                wrong = Text("{problem}: unconverted tensors are not what this layout holds", problem=wrong)
            raise ValueError(Text("{format} at row {row}, column {column}: {problem}", format=kind.title,
                                  row=place.row, column=place.column, problem=wrong))


def tiles(found: Sequence[Described], leaves: Mapping[str, Tensor]) -> list[Tile]:
    """The tiles of checked leaves, as views; a leaf that several have is one tensor."""
    import torch

    views: dict[str, Tensor] = {}
    made = []
    for place, fields in found:
        kind = codec(place.codec)
        known = kind.orders[place.order] if place.order else kind.fields
        for field, leaf in fields.items():
            if leaf not in views:
                name, index = _index(leaf)
                tensor, wanted = leaves[name] if index is None else leaves[name][index], known[field].dtypes[0]
                undo = str(tensor.dtype).removeprefix("torch.") == AS_SAVED.get(wanted)
                views[leaf] = tensor.view(getattr(torch, wanted)) if undo else tensor
        made.append(Tile(place, {field: views[leaf] for field, leaf in fields.items()}))
    return made


def _index(leaf: str) -> tuple[str, int | None]:
    name, _, index = leaf.partition("[")
    return name, int(index.rstrip("]")) if index else None


def read(state_dict: dict[str, Any], prefix: str, conf: Mapping[str, Any], shape: tuple[int, ...]) -> list[Tile]:
    """Take the tiles that a marker lists out of a state dict. Raises ValueError as `described` and `check` do."""
    try:
        found = described(conf)
        names = {_index(leaf)[0] for _, fields in found for leaf in fields.values()}
        leaves = {name: state_dict.pop(f"{prefix}{name}") for name in names if f"{prefix}{name}" in state_dict}
        check(found, seen_in(leaves), (shape[0], shape[1]))
    except ValueError as error:
        raise ValueError(Text("{name}: {problem}", name=prefix.rstrip("."), problem=error)) from error
    return tiles(found, leaves)


def seen_in(leaves: Mapping[str, Tensor]) -> dict[str, Seen]:
    """What `check` looks at."""
    return {leaf: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for leaf, tensor in leaves.items()}

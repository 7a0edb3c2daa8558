"""Scales that mean nothing, in the words of the file: which stored tensor holds what no writer of its format stores
(quant/scales.py has the rules, codecs say which of them their fields keep).

Looked at where a layer is laid out, one at a time, so an error comes from the loader. Where scales lie among the codes
(GGUF) that would read the whole file, which is not read before its weights are used: there it is when the host has
loaded the model for its first run, with an error before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import host
from ..host.texts import both
from .architectures.base import tensor_name
from .errors import CheckpointError
from .plan import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.codecs.base import Damage
    from ..quant.tile import Tile

KEY = "qt.scales"
Stored = Callable[[str], str]


class DamagedError(ValueError):
    """A stored tensor holds numbers that mean nothing."""


def refuse(layer: Layer, part: Mapping[str, Tensor], tiles: Sequence[Tile], stored: Stored, deep: bool) -> None:
    """Raise DamagedError for tiles with scales that mean nothing, which were made of the tensors `part` of a layer;
    `deep`: also for those among codes. `stored` gives a tensor's name in the file."""
    from ..quant.codecs import codec
    from ..quant.scales import refusal

    for tile in tiles:
        kind = codec(tile.place.codec)
        if (deep or not kind.deep) and (found := kind.damage(tile)):
            raise DamagedError(refusal(_named(layer, part, tile, found, stored), found.found, found.rule))


def _named(layer: Layer, part: Mapping[str, Tensor], tile: Tile, found: Damage, stored: Stored) -> str:
    """The stored tensor that a damaged field was made of: the one that holds the same, else all beside the weight."""
    names = [leaf for leaf in layer.leaves if leaf in part and leaf != "bias"][1:] if found.field != "codes" else []
    same = [leaf for leaf in names if _holds(part[leaf], found, str(tile[found.field].dtype))]
    scales = [leaf for leaf in same if "scale" in leaf]
    return both(stored(tensor_name(layer.name, leaf)) for leaf in scales[:1] or same[:1] or names or layer.leaves[:1])


def _holds(tensor: Tensor, found: Damage, dtype: str) -> bool:
    """Whether a stored tensor holds what was found in a field of this dtype."""
    import torch

    from ..quant.scales import EXPONENTS, damage

    if tensor.dtype == torch.uint8 and dtype == "torch.float8_e4m3fn":
        tensor = tensor.view(torch.float8_e4m3fn)
    if found.rule == EXPONENTS and tensor.element_size() > 1:
        return False
    return damage(tensor, found.rule) == found.found


def at_load() -> bool:
    """Whether scales among codes have to be looked at when a file is read: this host does not say later that it has
    loaded a model."""
    return bool(host.lacking("LoRA beside the weight"))


class Rows(NamedTuple):
    """A stored tensor, and which rows of a native module are its."""

    name: str
    first: int
    rows: int


def watch(patcher: Any, names: Mapping[str, Sequence[Rows]], where: str, do: str) -> None:
    """Refuse a MODEL or CLIP with scales among its codes that mean nothing when the host has loaded it for the first
    time (now, if it has), and where rows of a table are looked up. `names` are the stored tensors of native modules, by
    the ends of the paths at which the host has them."""
    from ..quant.codecs import codec
    from ..quant.layouts.tiled import is_tiled, tiles_of

    waiting: list[tuple[Any, Sequence[Rows]]] = []

    def loaded(*_: Any) -> None:
        while waiting:  # each once
            module, stored = waiting[-1]
            for tile in tiles_of(module.weight) if is_tiled(module.weight) else ():
                if found := codec(tile.place.codec).damage(tile):
                    raise _error(_those(tile, stored), where, do, found)
            waiting.pop()

    def looked_up(stored: Sequence[Rows], found: Damage) -> None:
        raise _error(stored, where, do, found)

    for path, module in patcher.model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not is_tiled(weight) or not any(codec(place.codec).deep for place in weight._params.tiles):
            continue
        stored = _at_the_end(path, names) or [Rows(f"{path}.weight", 0, weight.shape[0])]
        if hasattr(module, "refuse_rows"):  # of a table only those of a prompt are read
            module.refuse_rows = partial(looked_up, stored)
        else:
            waiting.append((module, stored))
    if host.is_loaded(patcher):
        loaded()
    elif waiting:
        host.call_back(patcher, KEY, loaded)


def _error(stored: Sequence[Rows], where: str, do: str, found: Damage) -> CheckpointError:
    from ..quant.scales import refusal

    return CheckpointError(refusal(both(rows.name for rows in stored), found.found, found.rule), where, do)


def _those(tile: Tile, stored: Sequence[Rows]) -> Sequence[Rows]:
    """Which of a module's stored tensors the damage of a tile is in: it may be made of several."""
    from ..quant.codecs import codec

    place, kind = tile.place, codec(tile.place.codec)
    parts = [rows for rows in stored if rows.first < place.row + place.rows and place.row < rows.first + rows.rows]
    if len(parts) < 2:
        return parts or stored
    return [rows for rows in parts if kind.damage(kind.cut(tile, rows.first - place.row, rows.rows))] or parts


def _at_the_end(path: str, names: Mapping[str, Sequence[Rows]]) -> Sequence[Rows]:
    """What is known by the longest end of a path; nothing where none is known."""
    while path not in names and path:
        path = path.partition(".")[2]
    return names.get(path, ())

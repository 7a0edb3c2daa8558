"""SVDQuant Linears as ComfyUI's save nodes write them (parts.py says what the leaves are): loaded as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from ..stored import ByteOrder, Leaves
from .parts import FIELDS, FORMAT, MAX_PARTS, leaf_name, read_marker

if TYPE_CHECKING:
    from torch import Tensor

    from ..shards import Shard

PART_LEAVES = tuple(leaf_name(field, i) for i in range(MAX_PARTS) for field in FIELDS if (field, i) != ("codes", 0))
_LOW_RANK = leaf_name("down", 0)  # which every part has, if with no columns


class SavedParts:
    """A `formats.StoredFormat` whose tensors are native already; ops.py checks and reads them."""

    name = "SVDQuant parts"
    colour = (214, 140, 60)
    words = frozenset({FORMAT})
    companions = frozenset({"comfy_quant", "weight_delta", *PART_LEAVES})

    def matches(self, leaves: Leaves) -> bool:
        return _LOW_RANK in leaves and "comfy_quant" in leaves

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        right = leaves["comfy_quant"].dtype == "U8" and len(leaves["weight"].shape) == 2
        return "" if right else "weight or marker is no SVDQuant part"

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        refuse(name)


SAVED_PARTS = SavedParts()


def refuse(name: str) -> NoReturn:
    """Parts are no row shards: they go into a module alone. Raises ValueError."""
    raise ValueError(f"{name}: SVDQuant parts cannot be joined with other layers")


def kinds_of(marker: Tensor) -> set[str]:
    """The kinds of a stored layer's parts. Raises ValueError for a marker of another format."""
    places = read_marker(marker)
    if places is None:
        raise ValueError(f"its comfy_quant marker does not say {FORMAT}")
    return {place.kind for place in places}

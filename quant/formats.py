"""The registry of stored formats: what a Linear layer's tensors are, from dtypes and shapes alone.

A new format is one file with a `StoredFormat` and one line in `formats()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .fuse import Shard


class Stored(Protocol):
    """Dtype (safetensors name) and shape of a stored tensor, as its file's header tells them."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class ByteOrder(NamedTuple):
    """How a file packs NVFP4: even columns in the low nibble, and block scales in 128 x 4 tiles. Bytes alone do not
    tell; `why` says what did."""

    low_first: bool = True
    swizzled: bool = False
    why: str = ""


MODELOPT_ORDER = ByteOrder(why="ModelOpt's default")
Leaves = Mapping[str, Stored]  # one layer: "weight", "bias", "weight_scale", ... -> what is stored
PLAIN_DTYPES = frozenset({"F32", "BF16", "F16"})


class StoredFormat(Protocol):
    """One way to store a Linear layer.

    `name` appears in reports, `colour` (RGB) in the layer map, `words` are the names that metadata uses for it,
    `companions` the tensors it may have beside weight and bias.
    """

    name: str
    colour: tuple[int, int, int]
    words: frozenset[str]
    companions: frozenset[str]

    def matches(self, leaves: Leaves) -> bool:
        """Whether the dtypes and companions are this format's."""
        ...

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        """What is wrong with the stored dtypes and shapes for a [rows, columns] weight; empty when nothing is."""
        ...

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        """The stored tensors of layer `name` as row shards. Raises ValueError for invalid scales."""
        ...


class Plain:
    """An unquantized layer: BF16, F16 or F32."""

    name = "BF16"
    colour = (140, 146, 158)
    words: frozenset[str] = frozenset()
    companions: frozenset[str] = frozenset()

    def matches(self, leaves: Leaves) -> bool:
        return leaves["weight"].dtype in PLAIN_DTYPES and "weight_shard_1" not in leaves

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        return wrong_shape(leaves, rows, columns)

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        from .fuse import Shard

        return [Shard(name, "plain", part["weight"])]


PLAIN = Plain()


def wrong_shape(leaves: Leaves, rows: int, columns: int) -> str:
    """Compare the stored weight with the [rows, columns] the architecture needs."""
    shape = tuple(leaves["weight"].shape)
    if shape == (rows, columns):
        return ""
    hint = " (transposed)" if shape == (columns, rows) else ""
    return f"weight is {list(shape)}{hint}, expected {[rows, columns]}"


def scalar_problem(leaves: Leaves, leaf: str) -> str:
    """What is wrong with a scale that must be one float value; empty when it is right or absent."""
    scale = leaves.get(leaf)
    if scale is None:
        return ""
    if scale.dtype not in PLAIN_DTYPES:
        return f"{leaf} is {scale.dtype}, expected F32"
    if tuple(scale.shape) not in ((), (1,)):
        return f"{leaf} is {list(scale.shape)}, expected one value; per-row and per-block FP8 do not load"
    return ""


@lru_cache(maxsize=1)
def formats() -> tuple[StoredFormat, ...]:
    """All formats that this version loads, the most specific first."""
    from .fp8 import FP8
    from .nvfp4 import NVFP4
    from .saved import SAVED
    from .svdquant.saved import SAVED_PARTS

    return (SAVED_PARTS, SAVED, FP8, NVFP4, PLAIN)


def identify(leaves: Leaves) -> StoredFormat | None:
    """The format of a layer, or None when no format of this version matches."""
    return next((fmt for fmt in formats() if fmt.matches(leaves)), None)


def name_unsupported(leaves: Mapping[str, Any]) -> str:
    """Name a stored layer that `identify` does not know, for the refusal's message."""
    weight = leaves.get("weight")
    dtype = weight.dtype if weight is not None else ""
    scale = leaves.get("weight_scale")
    if "wscales" in leaves or "proj_down" in leaves:
        return "Nunchaku SVDQuant"
    if "qweight" in leaves:
        return "GPTQ/AWQ packed integers"
    if any(leaf.startswith(("absmax", "quant_map", "quant_state", "weight.")) for leaf in leaves):
        return "bitsandbytes"
    if "weight_scale_inv" in leaves:
        return "block-wise FP8"
    if "deq_scale" in leaves or "weight_offset" in leaves:
        return "Ascend ModelSlim"
    if dtype.startswith("F8") and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return "MXFP8"
    if dtype == "F8_E5M2":
        return "FP8 E5M2"
    if dtype == "I8":
        return "INT8"
    return f"{dtype or 'unknown'} weights"

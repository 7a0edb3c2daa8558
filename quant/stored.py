"""What a stored format is: a Linear layer's tensors, from dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..host.texts import Text
from .scales import FINITE, POSITIVE, checked

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Coded, Tile


class Stored(Protocol):
    """Dtype (safetensors name) and shape of a stored tensor, as its file's header tells them."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


TOLD, LIKELY, OPEN = "told", "likely", "open"


class ByteOrder(NamedTuple):
    """How a file packs NVFP4: even columns in the low nibble, and block scales in 128 x 4 tiles. Bytes alone do not
    tell; `why` says what did, and `certain` how well: TOLD, LIKELY (the scales' values may say otherwise) or OPEN (they
    have to)."""

    low_first: bool = True
    swizzled: bool = False
    why: str = ""
    certain: str = TOLD


MODELOPT_ORDER = ByteOrder(why="ModelOpt's default")
Leaves = Mapping[str, Stored]  # one layer: "weight", "bias", "weight_scale", ... -> what is stored
PLAIN_DTYPES = frozenset({"F32", "BF16", "F16"})
# Of ModelOpt's AWQ and SVDQuant: y = W (x * p) + B (A (x * p)).
FACTORS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})


class StoredFormat(Protocol):
    """One way to store a Linear layer.

    `name` appears in reports, `colour` (RGB) in the layer map, `words` are the names that metadata uses for it,
    `companions` the tensors it may have beside weight and bias. `codec` is that of its tiles.
    """

    name: str
    codec: str
    colour: tuple[int, int, int]
    words: frozenset[str]
    companions: frozenset[str]

    def matches(self, leaves: Leaves) -> bool:
        """Whether the dtypes and companions are this format's."""
        ...

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        """What is wrong with the stored dtypes and shapes for a [rows, columns] weight; empty when nothing is."""
        ...

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        """The stored tensors of layer `name` as tiles. Raises ValueError for invalid scales."""
        ...


class Plain:
    """An unquantized layer: BF16, F16 or F32; with `FACTORS` where ModelOpt's AWQ or SVDQuant was switched off for it
    after it had been calibrated."""

    name = "BF16"
    codec = "plain"
    colour = (140, 146, 158)
    words: frozenset[str] = frozenset()
    companions = frozenset(FACTORS)

    def matches(self, leaves: Leaves) -> bool:
        return leaves["weight"].dtype in PLAIN_DTYPES

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        return wrong_shape(leaves, rows, columns) or factors_problem(leaves, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        from .tile import Coded

        weight, (smooth, down, up) = part["weight"], factors(name, part)
        if down is not None and up is not None:
            weight = weight.float() + up.float() @ down.float()
        return Coded((plain_tile(weight if smooth is None else weight.float() * smooth.float()),), part.get("bias"))


PLAIN = Plain()


def plain_tile(weight: Tensor) -> Tile:
    """An unquantized weight [rows, columns] as a tile."""
    from .tile import Place, Tile

    return Tile(Place("plain", weight.shape[0], weight.shape[1]), {"codes": weight})


def read_scale(name: str, part: Mapping[str, Tensor], leaf: str) -> Tensor | None:
    """A scale as F32 scalar, or None. Raises ValueError unless it is finite and positive."""
    scale = part.get(leaf)
    if scale is None:
        return None
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ValueError(Text("{name}.{leaf} is {value}: a scale must be a finite positive number", name=name,
                              leaf=leaf, value=value))
    return scale.float().reshape(())


def wrong_shape(leaves: Leaves, rows: int, columns: int) -> str:
    """Compare the stored weight with the [rows, columns] the architecture needs."""
    shape = tuple(leaves["weight"].shape)
    if shape == (rows, columns):
        return ""
    if shape == (columns, rows):
        return Text("weight is {found} (transposed), expected {expected}", found=list(shape), expected=[rows, columns])
    return Text("weight is {found}, expected {expected}", found=list(shape), expected=[rows, columns])


def scalar_problem(leaves: Leaves, leaf: str) -> str:
    """What is wrong with a scale that must be one float value; empty when it is right or absent."""
    scale = leaves.get(leaf)
    if scale is None:
        return ""
    if scale.dtype not in PLAIN_DTYPES:
        return Text("{leaf} is {dtype}, expected F32", leaf=leaf, dtype=scale.dtype)
    if tuple(scale.shape) not in ((), (1,)):
        return Text("{leaf} is {shape}, expected one value", leaf=leaf, shape=list(scale.shape))
    return ""


def factors_problem(leaves: Leaves, rows: int, columns: int) -> str:
    """What is wrong with the FACTORS of a [rows, columns] weight, where there are any."""
    pair = [leaves[leaf] for leaf in FACTORS[1:] if leaf in leaves]
    if len(pair) == 1:
        return Text("one of {first} and {second}, and they belong together", first=FACTORS[1], second=FACTORS[2])
    rank = pair[0].shape[0] if pair and len(pair[0].shape) == 2 else 0
    for leaf, shape in zip(FACTORS, ((columns,), (rank, columns), (rows, rank)), strict=True):
        found = leaves.get(leaf)
        if found is not None and (found.dtype not in PLAIN_DTYPES or tuple(found.shape) != shape):
            return Text("{leaf} is {dtype} {shape}, expected floats {expected}", leaf=leaf, dtype=found.dtype,
                        shape=list(found.shape), expected=list(shape))
    return ""


def factors(name: str, part: Mapping[str, Tensor]) -> list[Tensor | None]:
    """A layer's FACTORS: p [columns], A [rank, columns], B [rows, rank], each of them None where it is not there.

    Raises ValueError for values that are not finite, or a p that is not positive.
    """
    found = [part.get(leaf) for leaf in FACTORS]
    for leaf, tensor in zip(FACTORS, found, strict=True):
        if tensor is not None:
            checked(f"{name}.{leaf}", tensor, POSITIVE if leaf == FACTORS[0] else FINITE)
    return found

"""What an architecture tells the loader: sizes, and a map from native modules to the stored ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from ..headers import TensorInfo

Dims = dict[str, int]  # the sizes that tell two models of one architecture apart; keys are the architecture's own


class Naming(NamedTuple):
    """How the stored tensors are called: "diffusers" or "native", the prefix before every name, and what a norm's
    one tensor is called (vendors write "scale", ComfyUI saves "weight")."""

    style: str
    prefix: str = ""
    norm: str = "weight"


class Module(NamedTuple):
    """One native module and the stored modules whose rows make it up.

    `native` is the host's name. `stored` are the stored names in row order, `rows` how many rows each has, `columns`
    the input width of a Linear (0 for a norm, whose one tensor is [rows]). `leaf` is the native name of the weight and
    `stored_leaf` the stored one ("weight", or "scale" for native norms). `swap_halves`: the stored upper and lower
    half of the rows are exchanged in the native one.
    """

    native: str
    stored: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool = True
    leaf: str = "weight"
    stored_leaf: str = "weight"
    swap_halves: bool = False


class Architecture(Protocol):
    """A diffusion transformer this pack can load. Stateless; one instance each."""

    name: str
    class_names: frozenset[str]

    def naming(self, names: Collection[str]) -> Naming | None:
        """The naming of these stored tensors when they are this architecture, else None."""
        ...

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        """The sizes that the shapes of the stored tensors tell. Raises ValueError when one needed is missing."""
        ...

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        """The sizes that a diffusers config.json tells. Raises ValueError for values the host cannot run."""
        ...

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        """The sizes of a host model (its unet_config), or None when it is another architecture."""
        ...

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        """Every module of a model of these sizes, in the host's order."""
        ...

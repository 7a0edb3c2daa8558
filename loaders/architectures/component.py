"""What is no transformer, as an Architecture: whoever asks for it says what it is, and its names are the host's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from .base import Dims, Inputs, Module, Naming


class Component:
    """See base.Architecture. `listed` are all modules, which go by one name in the host and in the files (as
    Checkpoint.know_as has it)."""

    class_names: frozenset[str] = frozenset()
    config_only: frozenset[str] = frozenset()

    def __init__(self, name: str, listed: Sequence[Module]) -> None:
        self.name, self.listed = name, listed

    def naming(self, names: Collection[str]) -> Naming:
        return Naming("native")

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        return {}

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        return {}

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        return None

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        return iter(self.listed)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        raise ValueError(Text("{name} is no diffusion transformer", name=self.name))

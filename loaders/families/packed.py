"""What families of packed weights have in common: their tensors go by the names of quant/packed from the first look on,
sizes are read from what is packed, and layers are read as any others, one by one, so that any mixture loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...host.texts import Text
from ...quant.stored import PLAIN_DTYPES, StoredFormat
from .. import plan as plans
from ..architectures import Architecture, Dims
from ..architectures.base import tensor_name
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TensorInfo
from ..description import CheckpointDescription
from ..errors import CheckpointError
from ..plan import Group, LoadPlan
from .base import Family
from .declarations import claims
from .modelopt import StoredLayers
from .names import adopt
from .reading import described

COLOURS = {"UINT4 (groups)": (150, 120, 70), "UINT8 (groups)": (185, 155, 105)}


class Packed(NamedTuple):
    """What a file says of one of its layers: its format, and the weight's [rows, columns] as far as they are told; or
    `problem`, why it cannot be read. `full_precision`: its activations are not to be quantized."""

    format: StoredFormat | None
    shape: tuple[int, int] | None = None
    problem: str = ""
    full_precision: bool = False


class PackedFamily(Family):
    """See base.Family. `leaves`: ends of stored names -> as quant/packed calls them."""

    leaves: Mapping[str, str] = {}

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        return COLOURS

    def claims(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What the files say of their quantization, and where. Raises CheckpointError for another tool's claim."""
        return claims(checkpoint)

    def layers(self, checkpoint: Checkpoint, claimed: Mapping[str, Any], groups: Mapping[str, Group],
               notes: list[str]) -> dict[str, Packed]:
        """Of all quantized layers, by name, from their tensors and what the files say; see `claims`. Raises
        CheckpointError for claims that mean nothing."""
        raise NotImplementedError

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        names = adopt(checkpoint)
        _rename(checkpoint, self.leaves)
        claimed, origins = self.claims(checkpoint)
        notes = list(names.notes)
        packed = self.layers(checkpoint, claimed, plans.by_layer(checkpoint.tensors), notes)
        whole = {**checkpoint.tensors, **{f"{name}.weight": TensorInfo("BF16", one.shape, 0, 0)
                                          for name, one in packed.items() if one.shape}}
        architecture, description = described(checkpoint, self.name, base, whole, producer=self.title,
                                              declared_in=list(origins))
        description.notes += notes
        description.full_precision += [name for name, one in packed.items() if one.full_precision]
        layers = _Layers(description, packed)
        plan = plans.make(LoadPlan(description, architecture), checkpoint.tensors, layers)
        description.notes += layers.notes()
        if all(fmt in PLAIN_DTYPES for fmt in description.formats):
            description.notes.append(Text("no layer is quantized, whatever {writer} declares", writer=self.title))
        return plan


class _Layers(StoredLayers):
    def __init__(self, description: CheckpointDescription, packed: Mapping[str, Packed]) -> None:
        super().__init__(description, scaled=False)
        self.packed = packed

    def format_of(self, name: str, leaves: Group, problems: list[str]) -> StoredFormat | None:
        one = self.packed.get(name)
        if one is None:
            return super().format_of(name, leaves, problems)
        if one.problem:
            problems.append(Text("{name}: {problem}", name=name, problem=one.problem))
        return one.format


def _rename(checkpoint: Checkpoint, leaves: Mapping[str, str]) -> None:
    """Let a checkpoint's tensors go by other leaves. Raises CheckpointError where a layer has both."""
    called: dict[str, str] = {}
    for name in checkpoint.tensors:
        end = next((end for end in leaves if name.endswith(f".{end}")), "")
        other = tensor_name(name.removesuffix(f".{end}"), leaves[end]) if end else name
        if other in called:
            raise CheckpointError(Text("{name} and {other} are weights of one layer", name=called[other],
                                       other=checkpoint.stored(name)), checkpoint.source.reference,
                                  Text("download it again, or report it to its publisher"))
        called[other] = checkpoint.stored(name)
    checkpoint.call(called)

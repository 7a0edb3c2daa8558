"""A planned SVDQuant file as the plan that a load executes, and its layers as tiles, one at a time.

Quantized layers are read with ordinary file reads, because every byte of them is laid out anew: memory-mapped pages of
the source would stay in memory beside the result. Unquantized tensors stay memory-mapped views, and their pages are let
go whenever the host has copied a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ....quant.blocks import ceil_to
from ....quant.svdquant.parts import CODEC
from ...architectures.base import tensor_name
from ...assemble import Tensors
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import TORCH_DTYPES
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...plan import Layer, LoadPlan, Piece, Planned, bias_of, count, leaves
from .mapped import letting_go
from .plan import LEAVES, UNNEEDED, Plan
from .plan import Layer as StoredLayer
from .recognise import Found
from .writers import OFFICIAL

if TYPE_CHECKING:
    import torch

    from ....quant.tile import Coded

_AGAIN = Text("download it again, or report it to its publisher")
_ASKED = 16  # layers whose values are asked for an order, spread over the file


@dataclass
class FilePlan(LoadPlan):
    """The plan of a file by one of Nunchaku's tables. `found.order` is what its layers are read in, and is settled
    before that (Family.settle)."""

    found: Found | None = None


def load_plan(found: Found, plan: Plan, description: CheckpointDescription, names: Mapping[str, str]) -> FilePlan:
    """The plan of a file as a load executes it. `names` are the formats of layers in reports, by stored name."""
    layers = {name: Layer(name, names[name], leaves(*(leaf for leaf in LEAVES if f"{name}.{leaf}" in found.stored
                                                      and leaf != UNNEEDED)), partial(_read, found, layer),
                          codecs=(_codec(found, layer),))
              for name, layer in plan.layers.items()}
    out = FilePlan(description, found.family.architecture, stored=lambda name: found.stored[name], hint=_AGAIN,
                   found=found)
    for module, pieces, plain in plan.modules:
        made = [Piece(layers[piece.layer.name], piece.layer.counts[piece.split], piece.split, piece.row, piece.column)
                for piece in pieces if piece.layer.name in layers]
        row = 0
        for part in plain:
            dtype = found.tensors[tensor_name(part.stored, module.stored_leaf)].dtype
            made.append(Piece(Layer(part.stored, dtype, leaves(module.stored_leaf, *bias_of(module)),
                                    first=part.first), part.rows, 0, row))
            row += part.rows
        out.modules.append(Planned(module, _in_rows(made)))
    count(out)
    return out


def _codec(found: Found, layer: StoredLayer) -> str:
    unsigned = layer.entry.unsigned and found.precision == "int4"
    return CODEC["awq" if layer.entry.awq else found.precision, unsigned]


def _in_rows(pieces: list[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: (piece.row, piece.column)))


def _read(found: Found, layer: StoredLayer, _: Layer, leaves: dict[str, torch.Tensor]) -> list[Coded]:
    """A quantized layer as tiles, one for each of the native modules that it is split into."""
    import torch

    from ....quant.svdquant.parts import awq_part, split_rows, tile_of, w4a4_part
    from ....quant.tile import Coded

    if "bias" not in leaves:  # a model without biases; packed zeros are zeros
        leaves["bias"] = torch.zeros(leaves["wscales"].shape[-1], dtype=torch.bfloat16)
    try:
        if layer.entry.awq:
            part, bias = awq_part(leaves, layer.rows, layer.columns, layer.entry.awq)
        else:
            unsigned = layer.entry.unsigned and found.precision == "int4"
            part, bias = w4a4_part(leaves, layer.rows, layer.columns, unsigned, found.order)
    except ValueError as error:
        raise ValueError(Text("{layer}: {error}", layer=layer.name, error=error)) from error
    if len(layer.counts) == 1:
        return [Coded((tile_of(part),), bias)]
    return [Coded((tile_of(one),), own) for one, own in
            zip(split_rows(part, layer.counts), bias.split(list(layer.counts)), strict=True)]


def settle_order(checkpoint: Checkpoint, plan: FilePlan) -> None:
    """Find out by values how the vectors of a row-major file lie, which its writer does not say. Raises CheckpointError
    where they do not tell either."""
    from ....quant.svdquant import packing, row_major

    found, where = plan.found, checkpoint.source.reference
    assert found is not None
    mapped = checkpoint.load_tensors()

    def leaf(layer: str, name: str) -> torch.Tensor:
        return mapped[found.stored[f"{layer}.{name}"]]

    layers = {piece.layer.name for planned in plan.modules for piece in planned.pieces if piece.layer.read}
    names = [name for name in sorted(layers) if not found.tensors[f"{name}.smooth_factor"].shape[0] % 128]
    packed = row_major.packed_vectors((leaf(name, "qweight"), leaf(name, "wscales"), leaf(name, "smooth_factor"))
                                      for name in names[::max(1, len(names) // _ASKED)])
    if packed is None:
        vectors = [leaf(name, vector) for name in layers for vector in ("smooth_factor", "wcscales", "bias")
                   if f"{name}.{vector}" in found.stored]
        if any(len(vector) % 128 or not vector.equal(packing.unpack_vector(vector)) for vector in vectors):
            raise CheckpointError(Text("nothing tells whether the vectors of this row-major file are in channel order "
                                       "or still in Nunchaku's: vLLM-Omni's converter has written both, and the values "
                                       "do not say"), where, OFFICIAL)
        packed = False  # the same in both orders
    found.order = row_major.RowMajor(packed)
    plan.description.notes.append(
        Text("the vectors beside the row-major weights are in Nunchaku's order, by their values") if packed else
        Text("the vectors beside the row-major weights are in channel order, by their values"))


class FileTensors(Tensors):
    """Quantized layers by ordinary reads, the others memory-mapped; see the module."""

    def __init__(self, checkpoint: Checkpoint, plan: LoadPlan) -> None:
        super().__init__(checkpoint, plan)
        self.copied = letting_go(self.mapped, checkpoint.headers)
        self.copied()  # making the views has touched every tensor
        self._reader = _Reader(checkpoint)

    def take(self, layer: Layer) -> dict[str, torch.Tensor]:
        names = {leaf: self.stored(tensor_name(layer.name, leaf)) for leaf in layer.leaves}
        if layer.read is not None:
            return self._reader.read(names)
        return {leaf if i else "weight": self.mapped[name]  # several modules may have its rows
                for i, (leaf, name) in enumerate(names.items())}

    def left(self) -> Collection[str]:
        return ()  # plan.py accounts for every tensor

    def opened(self) -> AbstractContextManager[object]:
        return self._reader


class _Reader:
    """Tensors of a checkpoint's files by name, a layer at a time in memory that the next layer uses again: large blocks
    that come and go leave holes between those that stay."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where = checkpoint.source.reference
        self._headers, self._files = checkpoint.headers, ExitStack()
        self._places: dict[str, tuple[Any, int]] = {}
        self._infos = {name: info for header in checkpoint.headers for name, info in header.tensors.items()}
        self._memory: Any = b""

    def __enter__(self) -> _Reader:
        for header in self._headers:
            file = self._files.enter_context(open(header.path, "rb"))
            self._places |= {name: (file, header.data_start) for name in header.tensors}
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """Tensors by other names (ours -> the file's), good until the next call. Raises CheckpointError for a file that
        has become shorter."""
        import numpy
        import torch

        infos = {name: self._infos[name] for name in names.values()}
        room = {name: ceil_to(info.end - info.start, 64) for name, info in infos.items()}
        if sum(room.values()) > len(self._memory):
            self._memory = numpy.empty(sum(room.values()), numpy.uint8)
        out, at = {}, 0
        for leaf, name in names.items():
            info, (file, data) = infos[name], self._places[name]
            raw = self._memory[at:at + info.end - info.start]
            at += room[name]
            file.seek(data + info.start)
            if file.readinto(raw.data) != len(raw):
                raise CheckpointError(Text("{name} ends before its last byte", name=name), self.where, _AGAIN)
            out[leaf] = torch.from_numpy(raw).view(getattr(torch, TORCH_DTYPES[info.dtype])).view(info.shape)
        return out

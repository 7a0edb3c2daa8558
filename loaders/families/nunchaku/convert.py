"""A planned SVDQuant file -> the host's native state dict, one stored layer at a time.

Quantized layers are read with ordinary file reads, because every byte of them is laid out anew: memory-mapped pages of
the source would stay in memory beside the result. Unquantized tensors stay memory-mapped views, and their pages are let
go whenever the host has copied a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ....quant import fuse
from ....quant.nvfp4 import ceil_to
from ...architectures import Module
from ...architectures.base import tensor_name
from ...assemble import NativeStateDict
from ...containers.checkpoint import Checkpoint
from ...containers.safetensors import TORCH_DTYPES
from ...description import CheckpointDescription
from ...errors import CheckpointError
from .describe import read_plan
from .mapped import letting_go
from .plan import LEAVES, UNNEEDED, Layer, Piece, Rows, part_kinds
from .recognise import Found

if TYPE_CHECKING:
    import torch

    from ....quant.svdquant.parts import Part

_AGAIN = "download it again, or report it to its publisher"


def convert(checkpoint: Checkpoint, description: CheckpointDescription,
            step: Callable[[], None] = lambda: None) -> NativeStateDict:
    """Native tensors of a described file; `step` is called once a module.

    Raises CheckpointError for scales that are not finite, a bias where the model has none, and a file that changed on
    the way.
    """
    import torch

    found, plan = read_plan(checkpoint, description)
    native, mapped = NativeStateDict(), checkpoint.load_tensors()
    native.copied = letting_go(mapped, checkpoint.headers)
    native.copied()  # making the views has touched every tensor
    with _Reader(checkpoint) as reader:
        layers = _Layers(found, reader)
        for planned in plan.modules:
            if planned.pieces:
                native.tensors |= _quantized(planned.module, planned.pieces, layers)
            else:
                native.tensors |= _plain(planned.module, planned.plain, found, mapped)
            step()
    native.copied()
    for mark in found.family.architecture.marks(description.dims):
        native.tensors[mark] = torch.zeros(0)
    native.part_kinds = part_kinds(description)
    pieces = [len(planned.pieces) for planned in plan.modules if planned.pieces]
    native.runs.append(f"{len(plan.layers)} quantized layers of the file are {len(pieces)} modules in ComfyUI, "
                       f"{sum(count > 1 for count in pieces)} of them in two parts")
    return native


def _plain(module: Module, rows: tuple[Rows, ...], found: Found, mapped: dict[str, torch.Tensor]
           ) -> dict[str, torch.Tensor]:
    def join(leaf: str) -> torch.Tensor:
        parts = [mapped[found.stored[tensor_name(part.stored, leaf)]] for part in rows]
        parts = [tensor if part.rows == part.total else tensor[part.first:part.first + part.rows]
                 for part, tensor in zip(rows, parts, strict=True)]
        return fuse.swap_rows(parts[0]) if module.swap_halves else fuse.join_rows(parts)

    tensors = {tensor_name(module.native, module.leaf): join(module.stored_leaf)}
    return tensors | {f"{module.native}.bias": join("bias")} if module.bias else tensors


def _quantized(module: Module, pieces: tuple[Piece, ...], layers: _Layers) -> dict[str, torch.Tensor]:
    """The tensors of one native Linear: its parts in their places, and one bias (that of parts which share rows is the
    sum, in F32)."""
    import torch

    from ....quant.svdquant.parts import native_tensors, placed

    taken = [(piece, *layers.take(piece)) for piece in pieces]
    shape = (sum(module.rows), module.inner[0])
    bias: torch.Tensor | None = taken[0][2]
    if len(taken) > 1:
        bias = torch.zeros(shape[0])
        for piece, _, rows in taken:
            bias[piece.row:piece.row + len(rows)] += rows.float()
    if not module.bias:
        if bias is not None and bias.any():
            raise CheckpointError(f"{pieces[0].layer.name} has a bias, and this model has none there", layers.where,
                                  _AGAIN)
        bias = None
    parts = [placed(part, piece.row, piece.column) for piece, part, _ in taken]
    return native_tensors(module.native, parts, bias, shape)


class _Layers:
    """Stored layers as parts, unpacked when the first of their rows is asked for and let go with the last."""

    def __init__(self, found: Found, reader: _Reader) -> None:
        self.found, self.reader, self.where = found, reader, reader.where
        self._open: dict[str, list[tuple[Part, torch.Tensor] | None]] = {}

    def take(self, piece: Piece) -> tuple[Part, torch.Tensor]:
        """The part and the bias of a piece; each can be taken once."""
        name = piece.layer.name
        if name not in self._open:
            self._open[name] = list(self._read(piece.layer))
        splits = self._open[name]
        taken, splits[piece.split] = splits[piece.split], None
        assert taken is not None
        if not any(splits):
            del self._open[name]
        return taken

    def _read(self, layer: Layer) -> list[tuple[Part, torch.Tensor]]:
        import torch

        from ....quant.svdquant.parts import awq_part, split_rows, w4a4_part

        stored = self.found.stored
        leaves = self.reader.read({leaf: stored[f"{layer.name}.{leaf}"] for leaf in LEAVES
                                   if f"{layer.name}.{leaf}" in stored and leaf != UNNEEDED})
        if "bias" not in leaves:  # a model without biases; packed zeros are zeros
            leaves["bias"] = torch.zeros(leaves["wscales"].shape[-1], dtype=torch.bfloat16)
        try:
            if layer.entry.awq:
                part, bias = awq_part(leaves, layer.rows, layer.columns, layer.entry.awq)
            else:
                unsigned = layer.entry.unsigned and self.found.precision == "int4"
                part, bias = w4a4_part(leaves, layer.rows, layer.columns, unsigned)
        except ValueError as error:
            raise CheckpointError(f"{layer.name}: {error}", self.where, _AGAIN) from error
        if len(layer.counts) == 1:
            return [(part, bias)]
        return list(zip(split_rows(part, layer.counts), bias.split(list(layer.counts)), strict=True))


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
                raise CheckpointError(f"{name} ends before its last byte", self.where, _AGAIN)
            out[leaf] = torch.from_numpy(raw).view(getattr(torch, TORCH_DTYPES[info.dtype])).view(info.shape)
        return out

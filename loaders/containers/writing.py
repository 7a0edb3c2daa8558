"""A new safetensors file whose tensors come one after the other: what lies where, put there, and read back.

A header is known before the first tensor is made, so each tensor goes straight to its place in the file; safetensors'
own writer wants all tensors of a file at once. The layout is the one that it documents
(https://github.com/huggingface/safetensors#format) and uses itself: wide types first, so that each tensor is aligned.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...host.texts import Text
from ..errors import CheckpointError
from ..words import first_ten
from .safetensors import DTYPE_BITS, TORCH_DTYPES, TensorInfo, dtype_name

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes between two looks at Cancel
_OURS = Text("report this: it is an error in this pack")
_ORDER = {dtype: place for place, dtype in enumerate(TORCH_DTYPES)}


class Declared(NamedTuple):
    """A tensor that is to be written: its name, safetensors' name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def declared(name: str, tensor: torch.Tensor) -> Declared:
    """What a tensor will be in the file. Raises CheckpointError for a dtype that safetensors does not have."""
    dtype = dtype_name(tensor.dtype)
    if not dtype:
        raise CheckpointError(Text("{name} is {dtype}, which a safetensors file cannot hold", name=name,
                                   dtype=str(tensor.dtype).removeprefix("torch.")), "", Text("report this"))
    return Declared(name, dtype, tuple(tensor.shape))


Put = Callable[[str, int, "torch.Tensor"], int]  # (tensor, its first element, values) -> bytes written, on any thread
Parts = Generator[int, None, None]  # bytes, as they have been written; closed, no thread of it writes any more


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together and lie in one file (a layer's weight and its scales).

    `write` is called at most once, in the order of the pieces: it hands every element of the tensors to `put`, in any
    order, and may raise CheckpointError. What it reads through a memory map counts as this process's memory, what it
    reads into a buffer only as long as it holds that.
    """

    tensors: tuple[Declared, ...]
    write: Callable[[Put], Parts]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def whole(tensors: Iterable[tuple[str, str, tuple[int, ...]]],
          make: Callable[[], Mapping[str, torch.Tensor]]) -> Piece:
    """A piece whose tensors `make` returns at once, on the CPU and exactly as declared."""
    told = tuple(Declared(*tensor) for tensor in tensors)

    def write(put: Put) -> Parts:
        made = dict(make())
        _refuse_other(told, made)
        for name, *_ in told:
            flat = made.pop(name).detach().contiguous().reshape(-1)
            size = CHUNK // flat.element_size()
            for start in range(0, flat.numel(), size):
                yield put(name, start, flat[start:start + size])

    return Piece(told, write)


def _refuse_other(tensors: Sequence[Declared], made: Mapping[str, torch.Tensor]) -> None:
    told = {tensor.name: tensor for tensor in tensors}
    for name in sorted(told.keys() | made.keys()):
        if name not in told or name not in made:
            raise CheckpointError(Text("the tensor {name} was made, but not declared", name=name) if name in made else
                                  Text("the tensor {name} was not made, but declared", name=name), "", _OURS)
        tensor, (_, dtype, shape) = made[name], told[name]
        if (dtype_name(tensor.dtype), tuple(tensor.shape), tensor.device.type) != (dtype, shape, "cpu"):
            raise CheckpointError(Text("the tensor {name} is {dtype} {shape} on {device}, declared was {told_dtype} "
                                       "{told_shape}", name=name, dtype=tensor.dtype, shape=list(tensor.shape),
                                       device=tensor.device, told_dtype=dtype, told_shape=list(shape)), "", _OURS)


@dataclass(frozen=True)
class Layout:
    """The first bytes of a file (length and header), and every tensor with its place behind them, in their order."""

    head: bytes
    tensors: dict[str, TensorInfo]

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(self.head) + max((info.end for info in self.tensors.values()), default=0)


def lay_out(tensors: Iterable[Declared], metadata: Mapping[str, str]) -> Layout:
    """Where safetensors would put these tensors. Raises CheckpointError for a name that is there twice, and for a dtype
    that torch does not have."""
    at = 0
    places: dict[str, TensorInfo] = {}
    for tensor in sorted(tensors, key=lambda tensor: (_ORDER.get(tensor.dtype, -1), tensor.name)):
        name, dtype, shape = tensor
        if dtype not in TORCH_DTYPES or name in places:
            raise CheckpointError(Text("{name} is to be written twice", name=name) if name in places else
                                  Text("{name} is to be written as {dtype}", name=name, dtype=dtype), "",
                                  Text("this cannot be; types are {dtypes}", dtypes=", ".join(TORCH_DTYPES)))
        places[name] = TensorInfo(dtype, shape, at, at + tensor.bytes)
        at += tensor.bytes
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    entries |= {name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.end]}
                for name, info in places.items()}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(8, "little") + text, places)


class NotWritten(Exception):
    """An OSError while the values of the tensor `name` were written, to tell it from those while they were made."""

    def __init__(self, name: str, error: OSError) -> None:
        super().__init__(name, error)
        self.name, self.error = name, error


def write_piece(file: int, layout: Layout, piece: Piece, step: Callable[[int], None]) -> None:
    """Put a piece's tensors into their places of the open file; `step` is told the bytes and may raise.

    Raises NotWritten, what the piece raises, and CheckpointError for values that do not fill the places. Whatever is
    raised, nothing writes to the file any more.
    """
    import torch

    def put(name: str, start: int, values: torch.Tensor) -> int:
        info = layout.tensors[name]
        at, data = info.start + start * values.element_size(), values.reshape(-1).view(torch.uint8).numpy().data
        if dtype_name(values.dtype) != info.dtype or at + len(data) > info.end:
            raise CheckpointError(Text("{name}: {bytes} bytes of {dtype} at {start} are beyond its {told_dtype} "
                                       "{told_shape}", name=name, bytes=len(data), dtype=values.dtype, start=start,
                                       told_dtype=info.dtype, told_shape=list(info.shape)), "", _OURS)
        try:
            write_at(file, len(layout.head) + at, data)
        except OSError as error:
            raise NotWritten(name, error) from error
        return len(data)

    left = piece.bytes
    with closing(piece.write(put)) as parts:
        for count in parts:
            left -= count
            step(count)
    if left:
        raise CheckpointError(Text("{bytes} bytes of {names} were not written", bytes=left,
                                   names=first_ten([tensor.name for tensor in piece.tensors])), "", _OURS)


_SEEKING = threading.Lock()


def write_at(file: int, at: int, data: bytes | memoryview) -> None:
    """Write all of `data` to the open file, at byte `at`."""
    data = memoryview(data)
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file, data, at)
        else:  # Windows
            with _SEEKING:
                os.lseek(file, at, os.SEEK_SET)
                count = os.write(file, data)
        data, at = data[count:], at + count


def difference(path: Path, layout: Layout, metadata: Mapping[str, str]) -> str:
    """Where the file, as safetensors reads it, is not laid out so; empty when it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            told = {name: (info.dtype, info.shape) for name, info in layout.tensors.items()}
            if (file.metadata() or {}) != dict(metadata):
                return Text("its metadata")
    except (SafetensorError, OSError) as error:
        return str(error)
    return first_ten(sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name)))

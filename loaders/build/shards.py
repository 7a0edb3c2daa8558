"""safetensors files whose tensors come one at a time: what lies where, put there, and read back.

A header is known before its first tensor is made, so each tensor goes straight to its place in the file; safetensors'
own writer wants all tensors of a file at once. The layout is the one that it documents
(https://github.com/huggingface/safetensors#format) and uses itself: wide types first, so that each tensor is aligned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, first_ten
from ..headers import DTYPE_BITS, TensorInfo
from ..publish import Step

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes between two looks at Cancel
_TORCH = {"I64": "int64", "F64": "float64", "F32": "float32", "I32": "int32", "BF16": "bfloat16", "F16": "float16",
          "I16": "int16", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
          "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # in safetensors' own order


@dataclass(frozen=True)
class Piece:
    """Tensors of the result that are made together and lie in one shard (a layer's weight and its scales).

    `tensors` are (name, safetensors dtype, shape). `make` is called at most once, in the order of the pieces, and
    returns CPU tensors of exactly these types and shapes; it may raise CheckpointError. What it reads through a memory
    map counts as this process's memory, what it reads into a buffer only as long as it holds that.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    make: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in self.tensors)


@dataclass(frozen=True)
class Shard:
    name: str
    pieces: list[Piece]
    head: bytes  # length and header
    tensors: dict[str, TensorInfo]  # in the order of the file

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def make_shards(pieces: Sequence[Piece], most: int, stem: str, header: Mapping[str, str]) -> list[Shard]:
    """Pieces in their order, packed into files of at most `most` bytes of tensors. Raises CheckpointError."""
    seen: set[str] = set()
    for name, dtype, _ in (tensor for piece in pieces for tensor in piece.tensors):
        if dtype not in _TORCH or name in seen:
            raise CheckpointError(f"{name} is to be written {'twice' if name in seen else f'as {dtype}'}", "",
                                  f"this cannot be; types are {', '.join(_TORCH)}")
        seen.add(name)
    if not seen:
        raise CheckpointError("there are no tensors to write")
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size and size + piece.size > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    many = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = many if len(groups) > 1 else [f"{stem}.safetensors"]
    return [_shard(name, group, header) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, pieces: list[Piece], header: Mapping[str, str]) -> Shard:
    at = 0
    tensors: dict[str, TensorInfo] = {}
    for key, dtype, shape in sorted((tensor for piece in pieces for tensor in piece.tensors),
                                    key=lambda tensor: (list(_TORCH).index(tensor[1]), tensor[0])):
        end = at + prod(shape) * DTYPE_BITS[dtype] // 8
        tensors[key] = TensorInfo(dtype, shape, at, end)
        at = end
    entries: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))} if header else {}
    entries |= {key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.end]}
                for key, info in tensors.items()}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, pieces, len(text).to_bytes(8, "little") + text, tensors)


def refuse_other(piece: Piece, tensors: Mapping[str, torch.Tensor]) -> None:
    told = {name: (dtype, tuple(shape)) for name, dtype, shape in piece.tensors}
    for name in sorted(told.keys() | tensors.keys()):
        if name not in told or name not in tensors:
            raise CheckpointError(f"the tensor {name} was {'made, but not' if name in tensors else 'not made, but'} "
                                  "declared", "", "report this: it is an error in this pack")
        (dtype, shape), tensor = told[name], tensors[name]
        if (str(tensor.dtype), tuple(tensor.shape), tensor.device.type) != (f"torch.{_TORCH[dtype]}", shape, "cpu"):
            raise CheckpointError(f"the tensor {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                                  f"declared was {dtype} {list(shape)}", "", "report this: it is an error in this pack")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def put(out: int, at: int, data: memoryview, step: Step) -> None:
    os.lseek(out, at, os.SEEK_SET)
    while data:
        count = os.write(out, data[:CHUNK])
        data = data[count:]
        step(count)


def difference(path: Path, shard: Shard, header: Mapping[str, str]) -> str:
    """Where the file, as safetensors reads it, is not the shard; empty when it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            told = {name: (info.dtype, info.shape) for name, info in shard.tensors.items()}
            if (file.metadata() or {}) != dict(header):
                return "its metadata"
    except (SafetensorError, OSError) as error:
        return str(error)
    return first_ten(sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name)))

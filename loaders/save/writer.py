"""One safetensors file, written layer by layer, that appears whole or not at all.

Until it is complete it is called `.<name>.part`, which no loader lists or opens, and it is locked. Then it is synced to
the disk and renamed. What a killed run leaves is taken over by the next one for the same name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import CheckpointError
from ..headers import DTYPE_BITS
from ..report import size
from .target import refuse_existing

if TYPE_CHECKING:
    import torch

# torch dtype -> safetensors' name for it
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
          "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
ALIGNMENT = 8
CHUNK = 1 << 26  # bytes between two looks at Cancel


@dataclass(frozen=True)
class Tensor:
    """Name, safetensors dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Layer:
    """Tensors that are made together: what they will be, and how to make them (name -> CPU tensor)."""

    tensors: tuple[Tensor, ...]
    make: Callable[[], Mapping[str, torch.Tensor]]


def declared(name: str, tensor: torch.Tensor) -> Tensor:
    """What a tensor will be in the file. Raises CheckpointError for a dtype that safetensors does not have."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is {dtype}, which a safetensors file cannot hold", "", "report this")
    return Tensor(name, DTYPES[dtype], tuple(tensor.shape))


def write(target: Path, layers: Sequence[Layer], metadata: Mapping[str, str], *, overwrite: bool = False,
          check: Callable[[str], None] = lambda path: None, step: Callable[[int], None] = lambda amount: None) -> None:
    """Write `target` from `layers`, one in memory at a time.

    Tensors whose bytes are a multiple of 8 come first, layer by layer, then the others, which are small, wide elements
    before narrow ones: so every tensor is aligned for a reader that maps the file. `check` is called with the path of
    the complete file before it gets its name, and may raise.

    Raises CheckpointError for a full disk or one that cannot be written to, another run at work on the same name, and
    a layer that makes other tensors than it declared. Whatever is raised, the file under construction is removed and
    what was at `target` stays.
    """
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    first = [tensor for tensor in tensors if tensor.bytes % ALIGNMENT == 0]
    last = sorted((tensor for tensor in tensors if tensor.bytes % ALIGNMENT), key=lambda t: -DTYPE_BITS[t.dtype])
    header = _header([*first, *last], metadata)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, target) as file:
            try:
                _check_space(target, len(header) + sum(tensor.bytes for tensor in tensors))
                file.truncate(0)
                file.write(header)
                _write_layers(file, layers, last, step)
                file.flush()
                os.fsync(file.fileno())
                check(str(part))
                refuse_existing(target, overwrite)
                if os.name == "nt":  # which does not rename an open file
                    file.close()
                _replace(part, target)
            except BaseException:  # Cancel too
                if os.name == "nt":
                    file.close()
                with suppress(OSError):
                    part.unlink()
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(f"cannot write the file: {error.strerror or error}", error.filename or target,
                              "make space on the disk, or choose another one" if full else
                              "check the folder and its rights") from error


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data begin at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                                "data_offsets": [at, at := at + tensor.bytes]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_layers(file: IO[bytes], layers: Sequence[Layer], last: Sequence[Tensor],
                  step: Callable[[int], None]) -> None:
    small: dict[str, torch.Tensor] = {}
    for layer in layers:
        made = dict(layer.make())
        for tensor in layer.tensors:
            data = made.pop(tensor.name, None)
            if data is None or declared(tensor.name, data) != tensor:
                raise CheckpointError(f"{tensor.name} did not become what was planned: {tensor.dtype} "
                                      f"{list(tensor.shape)}", "", "report this")
            if tensor.bytes % ALIGNMENT:
                small[tensor.name] = data.clone()  # not a view that keeps all of its layer
            else:
                _write_tensor(file, data, step)
    for tensor in last:
        _write_tensor(file, small[tensor.name], step)


def _write_tensor(file: IO[bytes], data: torch.Tensor, step: Callable[[int], None]) -> None:
    import torch

    flat = data.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(CHUNK):
        file.write(piece.numpy().data)
        step(len(piece))


def _check_space(target: Path, need: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise CheckpointError(f"the file needs {size(need)}, {size(free)} are free", target.parent,
                              "make space, or choose another disk")


@contextmanager
def _locked(part: Path, target: Path) -> Iterator[IO[bytes]]:
    """The file under construction, open and ours alone. Raises CheckpointError when another process writes it."""
    with open(part, "a+b") as file:
        try:
            import fcntl
        except ImportError:  # Windows: does not rename a file that another process has open
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        except (BlockingIOError, FileNotFoundError):
            ours = False  # or the other run has just finished, and what is open is its result
        if not ours:
            raise CheckpointError("another run is writing this file", target, "wait for it, or give another name")
        yield file


def _replace(part: Path, target: Path) -> None:
    os.replace(part, target)
    if os.name == "nt":
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

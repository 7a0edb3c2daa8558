"""A new GGUF file: its header by gguf-py, where each tensor lies, and what gguf-py's reader finds in the result."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ... import host
from ...host.texts import Text
from ...loaders.containers.gguf import MAGIC, ORIGINAL_SHAPE
from ...loaders.containers.safetensors import TensorInfo
from ...loaders.containers.writing import Layout
from ...loaders.errors import CheckpointError
from ...loaders.words import first_ten
from ...quant.ggml import TYPES

SUFFIX = ".gguf"
ALIGNMENT = 32  # of every tensor; gguf-py's default


class Stored(NamedTuple):
    """A tensor of the file: its type, the shape it is stored in, and the one that it means."""

    kind: str
    shape: tuple[int, ...]
    logical: tuple[int, ...]

    @property
    def bytes(self) -> int:
        kind = TYPES[self.kind]
        return prod(self.shape) // kind.block * kind.size


@dataclass(frozen=True)
class GGUFLayout(Layout):
    """Every tensor as bytes (U8), each at the next multiple of ALIGNMENT; the file ends at one, as ggml wants it."""

    @property
    def bytes(self) -> int:
        return len(self.head) + _padded(max((info.end for info in self.tensors.values()), default=0))


def gguf_py() -> Any:
    """The package gguf. Raises CheckpointError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise CheckpointError(Text("the package gguf cannot be imported ({error})", error=error), "",
                              Text("install it (pip install gguf): it writes and quantizes GGUF files")) from error


def target_file(output: str, inputs: Sequence[Path], overwrite: bool = False) -> Path:
    """The file that `output` names; ".gguf" is added where it is missing, a relative one is below this pack's model
    folder. Nothing is changed on disk.

    Raises CheckpointError for a folder, a link, one of the `inputs`, and a file that exists (with `overwrite`: that is
    no GGUF file).
    """
    text = output.strip()
    path = Path(text).expanduser()
    if not text or ".." in path.parts or "\0" in text or text.endswith(("/", os.sep)):
        raise CheckpointError(Text("no output file is given") if not text else Text("this is no name of a file"), text,
                              Text("give the full path of a new .gguf file"))
    if path.suffix.lower() != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    if path.name.startswith("."):
        raise CheckpointError(Text("a hidden file is not found by ComfyUI"), path, Text("give another name"))
    if not path.is_absolute():
        path = Path(next(iter(host.model_folders()), os.getcwd()), path)
    if path.is_symlink() or path.is_dir():
        raise CheckpointError(Text("the output is a link or a folder"), path,
                              Text("give the full path of a new .gguf file"))
    real = Path(os.path.realpath(path))
    if any(real == Path(os.path.realpath(source)) for source in inputs):
        raise CheckpointError(Text("the output is the file to read"), path, Text("give another name"))
    if real.exists() and not overwrite:
        raise CheckpointError(Text("this file exists"), path, Text("give another name; nothing is overwritten"))
    if real.exists() and not _is_gguf(real):
        raise CheckpointError(Text("this is no GGUF file, so it is not overwritten"), path,
                              Text("give another name, or remove the file yourself"))
    return real


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def lay_out(tensors: Mapping[str, Stored], architecture: str, file_type: int,
            texts: Mapping[str, str] = MappingProxyType({})) -> GGUFLayout:
    """The header of a file with these tensors and further keys, written by gguf-py, and where each tensor lies behind
    it."""
    import numpy

    gguf = gguf_py()
    places: dict[str, TensorInfo] = {}
    at, header = 0, io.BytesIO()

    class InMemory(gguf.GGUFWriter):  # type: ignore[name-defined]  # a file of its own would outlive a kill
        def open_output_file(self, path: Path | None = None) -> None:
            self.fout, self.state = [header], gguf.gguf_writer.WriterState.EMPTY

    writer = InMemory(path=None, arch=architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    for key, text in texts.items():
        writer.add_string(key, text)
    for name, tensor in tensors.items():
        if tensor.shape != tensor.logical:
            writer.add_array(ORIGINAL_SHAPE + name, tensor.logical)
        writer.add_tensor_info(name, tensor.shape, numpy.dtype(numpy.float32), tensor.bytes,
                               raw_dtype=gguf.GGMLQuantizationType[tensor.kind])
        places[name] = TensorInfo("U8", (tensor.bytes,), at, at + tensor.bytes)
        at += _padded(tensor.bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = header.getvalue()
    return GGUFLayout(head + bytes(_padded(len(head)) - len(head)), places)


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def check(path: str, tensors: Mapping[str, Stored], layout: GGUFLayout) -> None:
    """Raise CheckpointError unless gguf-py reads just these tensors from the file at `path`, each in its place."""
    gguf = gguf_py()
    told = {name: (tensor.kind, tensor.shape, len(layout.head) + layout.tensors[name].start)
            for name, tensor in tensors.items()}
    wrong: object
    try:
        found = {tensor.name: (tensor.tensor_type.name, tuple(int(side) for side in reversed(tensor.shape)),
                               int(tensor.data_offset)) for tensor in gguf.GGUFReader(path).tensors}
        wrong = first_ten(sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name)))
    except (ValueError, IndexError, OSError) as error:
        wrong = error
    if wrong:
        raise CheckpointError(Text("what was written does not read back: {problem}", problem=wrong), path,
                              Text("check the disk, then run this again"))

"""Read and validate GGUF headers without touching tensor bytes.

Layout of a file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", u32 version, u64
number of tensors, u64 number of keys; the keys (name, u32 type, value); for each tensor its name, u32 number of
dimensions, u64 dimensions (fastest first), u32 type, u64 offset; padding to `general.alignment`; the tensors. Long
lists (a tokenizer's words) are passed over by their length.
"""

from __future__ import annotations

import json
import os
import struct
from math import prod
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ...quant.ggml import OTHERS, PLAIN, QUANTIZED
from ..errors import CheckpointError
from ..files.source import open_file
from ..files.strict import Invalid
from .safetensors import AGAIN, MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, TORCH_DTYPES, Header, TensorInfo, check_names

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors that ComfyUI-GGUF's converter has stored in another
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SHORT = 64  # numbers or strings: longer lists are not kept
_MOST, _MOST_KEYS = 1 << 31, 1 << 14
# A header is read in one piece, not mapped: a file that is cut while it is read ends a process that has it mapped. Most
# fit into the first size; the vocabulary of a text encoder may take 20 MB.
_READ = (1 << 20, 1 << 25)
_LONGEST_NAME = 4 * MAX_NAME  # bytes
_MOST_WORDS = 1 << 21  # in a list; a vocabulary has 300,000, its merges 600,000
_LENGTH, _COUNT = struct.Struct("<Q"), struct.Struct("<I")
_TENSORS = tuple(struct.Struct(f"<{count}QIQ") for count in range(MAX_DIMENSIONS + 1))  # dimensions, type, offset


class GGUFHeader(Header):
    """One validated header. `metadata` are the keys as text, lists as JSON. Tensors in blocks have their logical shape,
    and bytes."""

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors, memory-mapped: floats in their shape, blocks as U8 [bytes]."""
        import torch

        whole = torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)
        found = {}
        for name, info in self.tensors.items():
            data = whole[self.data_start + info.start:self.data_start + info.end]
            if info.dtype in TORCH_DTYPES:
                dtype = getattr(torch, TORCH_DTYPES[info.dtype])
                aligned = (self.data_start + info.start) % dtype.itemsize == 0
                data = (data if aligned else data.clone()).view(dtype).view(info.shape)
            found[name] = data
        return found


class _Short(Invalid):
    """What was read ends within the header."""

    def __init__(self) -> None:
        super().__init__(Text("it ends within its header"))


class _Reader:
    """Bytes of a header in order. Raises Invalid where they end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.at = data, len(data), 4

    def skip(self, count: int) -> int:
        """Move on; where that was."""
        at, self.at = self.at, self.at + count
        if self.at > self.size:
            raise _Short
        return at

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack_from(self.data, self.skip(form.size))

    def text(self) -> str:
        length = self.numbers(_LENGTH)[0]
        at = self.skip(length)
        return self.data[at:at + length].decode("utf-8", "replace")

    def tensor(self) -> tuple[str, tuple[int, ...]]:
        """A tensor's name; its dimensions, type and offset. In one step, as there are thousands of them."""
        data, at = self.data, self.at
        named = at + 8 + self.numbers(_LENGTH)[0]
        if named + 4 > self.size:
            raise _Short
        if named - at - 8 > _LONGEST_NAME:
            raise Invalid(Text("a tensor of the name {name!r}", name=bytes(data[at + 8:at + 108])))
        name, dimensions = data[at + 8:named].decode("utf-8", "replace"), _COUNT.unpack_from(data, named)[0]
        if dimensions > MAX_DIMENSIONS:
            raise Invalid(Text("{name} has {dimensions} dimensions", name=name, dimensions=dimensions))
        self.at = named + 4
        return name, self.numbers(_TENSORS[dimensions])

    def value(self, kind: int) -> Any:
        """A value; None for a list that is passed over."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._list()
        if kind not in _NUMBERS:
            raise Invalid(Text("a value of the unknown type {kind}", kind=kind))
        return self.number(_NUMBERS[kind])

    def _list(self) -> list[Any] | None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _NUMBERS:
            width = struct.calcsize(_NUMBERS[kind])
            if count > _SHORT:
                self.skip(width * count)
                return None
            return [self.number(_NUMBERS[kind]) for _ in range(count)]
        if kind != _STRING:
            raise Invalid(Text("a list of the unknown type {kind}", kind=kind))
        if count <= _SHORT:
            return [self.text() for _ in range(count)]
        if count > _MOST_WORDS:
            raise Invalid(Text("a list of {count:,} texts", count=count))
        if count * 8 > self.size - self.at:
            raise _Short
        unpack, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, self.size
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
            if at + 8 > size:
                raise _Short
        self.at = at
        return None


def read_header(path: str) -> GGUFHeader:
    """Read and validate the header of the GGUF file at `path`.

    Raises CheckpointError for what is no GGUF file of a known version, is cut short, or has a tensor of a type that
    nothing says the meaning of.
    """
    try:
        for most in _READ:
            with open_file(path) as file:
                size, data = os.fstat(file.fileno()).st_size, file.read(most)
            try:
                return _read(path, data, size)
            except _Short:
                if most == _READ[-1] or size <= most:
                    raise
        raise AssertionError
    except OSError as error:
        raise CheckpointError(Text("cannot read the file: {error}", error=error.strerror), path, AGAIN) from error
    except (Invalid, struct.error) as error:
        raise CheckpointError(Text("the GGUF header is invalid: {error}", error=error), path, AGAIN) from error


def _read(path: str, data: bytes, size: int) -> GGUFHeader:
    reader = _Reader(data)
    version = reader.number("<I")
    if version & 0xFFFF == 0:
        raise CheckpointError(Text("this GGUF file is big-endian, made for another kind of machine"), path,
                              Text("take the usual, little-endian file of this model"))
    if version not in (2, 3):
        raise CheckpointError(Text("this GGUF file is of version {version}; versions 2 and 3 are read",
                                   version=version), path,
                              Text("convert the model again with a current llama.cpp or ComfyUI-GGUF"))
    count, keys = reader.number("<Q"), reader.number("<Q")
    if count > min(MAX_TENSORS, size // 12) or keys > min(_MOST_KEYS, size // 12):
        raise Invalid(Text("{count:,} tensors and {keys:,} keys in {size:,} bytes", count=count, keys=keys,
                              size=size))
    found: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text()
        if key in found:
            raise Invalid(Text("the key {key!r} twice", key=key[:100]))
        found[key] = reader.value(reader.number("<I"))
    alignment = found.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & alignment - 1 or alignment > 1 << 20:
        raise Invalid(Text("an alignment of {alignment}", alignment=alignment))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, (*shape, number, offset) = reader.tensor()
        if name in tensors:
            raise Invalid(Text("the tensor {name!r} twice", name=name[:100]))
        tensors[name] = _tensor(name, tuple(shape[::-1]), found.get(ORIGINAL_SHAPE + name), number, offset)
    check_names(tensors)
    start = -(-reader.at // alignment) * alignment
    _check_ranges(tensors, size - start)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()
             if value is not None}
    return GGUFHeader(path, size, tensors, texts, start)


def _tensor(name: str, shape: tuple[int, ...], original: Any, number: int, offset: int) -> TensorInfo:
    kind = QUANTIZED.get(number) or PLAIN.get(number)
    if kind is None:
        raise Invalid(Text("{name} is {kind}, which is not loaded", name=name,
                              kind=OTHERS.get(number) or Text("of the unknown type {number}", number=number)))
    if shape and max(shape) > _MOST:
        raise Invalid(Text("{name} is {shape}", name=name, shape=list(shape)))
    if shape and shape[-1] % kind.block:
        raise Invalid(Text("{name} is {kind} with rows of {columns} values, no multiple of {block}", name=name,
                              kind=kind.name, columns=shape[-1], block=kind.block))
    values = prod(shape)
    if original is not None:
        if not isinstance(original, list) or len(original) > MAX_DIMENSIONS \
                or any(type(side) is not int or side < 0 for side in original) \
                or prod(original) != values:
            raise Invalid(Text("{name} was {original} and is stored as {shape}", name=name, original=original,
                                  shape=list(shape)))
        shape = tuple(original)
    return TensorInfo(kind.name, shape, offset, offset + values // kind.block * kind.size)


def _check_ranges(tensors: dict[str, TensorInfo], there: int) -> None:
    """No two tensors share bytes, and all are in the file."""
    at, before = 0, ""
    for start, end, name in sorted((info.start, info.end, name) for name, info in tensors.items()):
        if start < at:
            raise Invalid(Text("{before} and {name} overlap", before=before, name=name))
        at, before = end, name
    if at > there:
        raise Invalid(Text("the file is truncated: the tensors take {bytes:,} bytes, {there:,} are there", bytes=at,
                              there=max(there, 0)))


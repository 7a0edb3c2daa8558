"""Read and validate safetensors headers without touching tensor bytes.

Layout of a file (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes
of JSON, then the tensors, contiguous and without holes. The safetensors library validates most of this when it opens
a file, but it accepts duplicate keys, needs the whole file mapped, and its messages do not name the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ...host.texts import Text
from .. import words
from ..errors import CheckpointError
from ..files.source import open_file
from ..files.strict import Invalid, decode, twice

if TYPE_CHECKING:
    import torch

# Bits an element takes, by safetensors dtype name.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}
# torch's names of those that torch has, in the order in which safetensors lays tensors out: wide elements first.
TORCH_DTYPES = {
    "I64": "int64", "F64": "float64", "F32": "float32", "I32": "int32", "BF16": "bfloat16", "F16": "float16",
    "I16": "int16", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}
# Of a header; the safetensors library's own limit is 100 MB, which may take a minute and a GB to parse. Published ones
# stay below 1 MB; ComfyUI writes workflows into some.
MAX_HEADER = 16_000_000
MAX_DIMENSIONS = 8  # ggml has 4, a convolution of a video VAE 5
MAX_NAME = 500  # characters
MAX_TENSORS, MAX_NAMES = 25_000, 2_500_000  # of a checkpoint, and characters of their names; published ones have 7,000
MAX_READ = 1 << 20  # bytes of a tensor that holds text, such as ComfyUI's markers of 100
_LARGEST = 1 << 62
AGAIN = Text("download the file again; this one is damaged")


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; empty for one that it does not have."""
    short = str(dtype).removeprefix("torch.")
    return next((name for name, known in TORCH_DTYPES.items() if known == short), "")


class TensorInfo(NamedTuple):
    """What the header says of one tensor: dtype name, shape, and its byte range behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """One validated safetensors header. `size` is the file's size in bytes, `data_start` where the tensors begin."""

    path: str
    size: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors by name, memory-mapped by the host's own reader (bytes come in when they are used).

        Raises CheckpointError for a file that has changed, or that the installed safetensors library does not read.
        """
        from safetensors import SafetensorError

        from ... import host

        try:
            return host.load_file(self.path)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(Text("the safetensors library does not read the file: {error}",
                                       error=str(error)[:200]), self.path, AGAIN) from error

    def read(self, name: str) -> bytes:
        """The bytes of one tensor, for those that are small. Raises CheckpointError for a file that has changed."""
        info = self.tensors[name]
        if info.end - info.start > MAX_READ:
            raise CheckpointError(Text("{name} takes {size}, and is no such tensor as others write", name=name,
                                       size=words.size(info.end - info.start)), self.path, AGAIN)
        try:
            with open_file(self.path) as file:
                file.seek(self.data_start + info.start)
                raw = file.read(info.end - info.start)
        except OSError as error:
            raise CheckpointError(Text("cannot read the file: {error}", error=error.strerror), self.path,
                                  AGAIN) from error
        if len(raw) != info.end - info.start:
            raise CheckpointError(Text("{name} ends before its last byte", name=name), self.path, AGAIN)
        return raw


def _not_safetensors(start: bytes) -> str:
    """Name what a file really is when its first bytes give it away."""
    if start.startswith(b"version "):
        return Text("a Git LFS pointer, not the weights themselves")
    if start.startswith(b"PK\x03\x04") or start.startswith(b"\x80\x02"):
        return Text("a pickle (.pt/.ckpt) file, which can run code and is never read")
    if start.startswith(b"GGUF"):
        return Text("a GGUF file")
    if start.lstrip().startswith((b"<", b"{")):
        return Text("a text file (a web page or JSON saved under this name)")
    return ""


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    """Turn each tensor's entry into a TensorInfo while the JSON is parsed, and refuse duplicate keys."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise Invalid(twice(pairs))
    if len(entry) == 3 and isinstance(entry.get("data_offsets"), list):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or len(offsets) != 2 \
                or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < _LARGEST
                                                          for n in (*shape, *offsets)):
            raise Invalid(Text("a malformed tensor entry: {entry}", entry=str(entry)[:200]))
        return TensorInfo(dtype, tuple(shape), *offsets)
    return entry


def read_header(path: str) -> Header:
    """Read and validate the header of the safetensors file at `path`.

    Reads 8 bytes plus the header, nothing else. Raises CheckpointError for a file that is not safetensors, is
    truncated, or whose header is malformed: duplicate keys, unknown dtypes, byte ranges that overlap, leave holes, do
    not match dtype x shape, or do not fill the file.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > min(MAX_HEADER, size - 8):
                kind = _not_safetensors(start)
                if kind:
                    raise CheckpointError(Text("this is {kind}", kind=kind), path,
                                          Text("pick a .safetensors file with the weights"))
                if MAX_HEADER < length <= size - 8:
                    raise CheckpointError(Text("the header takes {size}, and no more than {limit} are read",
                                               size=words.size(length), limit=words.size(MAX_HEADER)), path,
                                          Text("get it from its publisher; it may be damaged"))
                raise CheckpointError(
                    Text("the header should be {length:,} bytes long but the file has only {size:,} bytes: it is "
                         "truncated or no safetensors file", length=length, size=size), path, AGAIN)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(Text("cannot read the file: {error}", error=error.strerror), path,
                              Text("check the path and its rights")) from error
    try:
        entries = decode(text, largest=MAX_HEADER, pairs=_pairs)
        if not isinstance(entries, dict):
            raise Invalid(Text("it is no JSON object"))
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise Invalid(Text("__metadata__ is no map of strings"))
        check_names(entries)
        _check_ranges(entries, size - 8 - length)
    except Invalid as error:
        raise CheckpointError(Text("the safetensors header is invalid: {error}", error=error), path, AGAIN) from error
    return Header(path, size, entries, metadata, 8 + length)


def check_names(names: Collection[str]) -> None:
    """Raise Invalid for more tensors than MAX_TENSORS, and for a name that no writer gives one: with a line's end or a
    control character, or longer than MAX_NAME."""
    if len(names) > MAX_TENSORS or sum(map(len, names)) > MAX_NAMES:
        raise Invalid(Text("{count:,} tensors, and no more than {most:,} are read", count=len(names), most=MAX_TENSORS))
    strange = next((name for name in names if len(name) > MAX_NAME or not name.isprintable()), None)
    if strange is not None:
        raise Invalid(Text("a tensor of the name {name!r}", name=strange[:100]))


def _check_ranges(entries: dict[str, TensorInfo], data_bytes: int) -> None:
    """Every byte behind the header belongs to exactly one tensor of exactly the right size."""
    ranges = []
    for name, info in entries.items():
        if type(info) is not TensorInfo:
            raise Invalid(Text("a malformed entry for {name!r}", name=name))
        bits = DTYPE_BITS.get(info.dtype)
        if bits is None:
            raise Invalid(Text("{name} has the unknown dtype {dtype!r}", name=name, dtype=info.dtype))
        if prod(info.shape) * bits != (info.end - info.start) * 8:
            raise Invalid(Text("{name} is {dtype} {shape} but takes {bytes:,} bytes", name=name, dtype=info.dtype,
                                  shape=list(info.shape), bytes=info.end - info.start))
        if info.end > info.start:
            ranges.append((info.start, info.end, name))
    ranges.sort()
    at, before = 0, ""
    for start, end, name in ranges:
        if start < at:
            raise Invalid(Text("{before} and {name} overlap", before=before, name=name))
        if start > at:
            raise Invalid(Text("there is a hole of {bytes:,} bytes before {name}", bytes=start - at, name=name))
        at, before = end, name
    if at > data_bytes:
        raise Invalid(Text("the file is truncated: the tensors take {bytes:,} bytes, {there:,} are there", bytes=at,
                              there=data_bytes))
    if at < data_bytes:
        raise Invalid(Text("{bytes:,} bytes behind the last tensor belong to nothing", bytes=data_bytes - at))

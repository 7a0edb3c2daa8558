"""Header reading: equal to the safetensors library on real files, and a named refusal for every malformed one."""

from __future__ import annotations

import io
import json
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
from safetensors import safe_open

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.containers.safetensors import read_header
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from support.synthetic import flux_header

pytestmark = pytest.mark.unit


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_equals_the_safetensors_library(tiny):
    file = next(tiny.fp8.glob("*.safetensors"))
    header = read_header(str(file))
    with safe_open(str(file), "pt") as reference:
        assert set(header.tensors) == set(reference.keys())
        for name, info in header.tensors.items():
            part = reference.get_slice(name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
        assert header.metadata == (reference.metadata() or {})


MALFORMED = {
    "header longer than the file": (dict(header={}, length=10_000), "10,000 bytes long"),
    "truncated": (dict(header={"a": entry(0, 8)}, data=b"1234"), "truncated: the tensors take 8 bytes, 4"),
    "no JSON": (dict(header=b"{not json"), "header is invalid"),
    "no object": (dict(header=b"[1]"), "no JSON object"),
    "duplicate keys": (dict(header=b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                                   b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', data=b"x"),
                       "duplicate keys: a"),
    "overlap": (dict(header={"a": entry(0, 8), "b": entry(4, 12)}, data=b"x" * 12), "a and b overlap"),
    "hole": (dict(header={"a": entry(0, 4), "b": entry(8, 12)}, data=b"x" * 12), "hole of 4 bytes before b"),
    "bytes of nobody": (dict(header={"a": entry(0, 4)}, data=b"x" * 6), "2 bytes behind the last tensor"),
    "unknown dtype": (dict(header={"a": entry(0, 4, "F13")}, data=b"x" * 4), "unknown dtype 'F13'"),
    "wrong size": (dict(header={"a": entry(0, 4, "BF16", [4])}, data=b"x" * 4), "BF16 [4] but takes 4 bytes"),
    "negative shape": (dict(header={"a": entry(0, 4, "F32", [-1])}, data=b"x" * 4), "malformed tensor entry"),
    "entry without dtype": (dict(header={"a": {"shape": [1], "data_offsets": [0, 4]}}, data=b"x" * 4),
                            "malformed entry for 'a'"),
    "metadata that is no map": (dict(header={"__metadata__": {"a": 1}}), "no map of strings"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_malformed(name, tmp_path):
    arguments, expected = MALFORMED[name]
    path = write(tmp_path / "file.safetensors", **arguments)
    with pytest.raises(CheckpointError) as caught:
        read_header(str(path))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value) and "what to do:" in str(caught.value)


@pytest.mark.parametrize(("start", "kind"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"PK\x03\x04" + b"\0" * 20, "pickle"),
    (b"<!DOCTYPE html><html>", "text file"), (b"GGUF" + b"\xff" * 20, "GGUF"), (b"abc", "truncated"), (b"", "truncated"),
])
def test_names_what_a_file_is_instead(start, kind, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=kind):
        read_header(str(path))


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in /proc/self/io")
def test_describing_reads_the_header_and_nothing_else(tmp_path):
    path = tmp_path / "flux.safetensors"
    assert flux_header(path, 19, 38) > 780
    header_bytes = struct.unpack("<Q", path.open("rb").read(8))[0]
    describe(Checkpoint(locate(str(path))))  # imports and caches

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    idle = -read_so_far() + read_so_far()
    before = read_so_far()
    description = describe(Checkpoint(locate(str(path))))
    used = read_so_far() - before - idle
    assert description.bytes_on_disk > 10e9 and not description.problems
    # buffered reading may round up by one buffer; the first tensor alone is larger
    assert 8 + header_bytes <= used <= 8 + header_bytes + io.DEFAULT_BUFFER_SIZE


def test_describing_5000_tensors_takes_under_5_mb(tmp_path):
    path = tmp_path / "big.safetensors"
    assert flux_header(path, 60, 110, hidden=128) > 5000
    describe(Checkpoint(locate(str(path))))
    tracemalloc.start()
    description = describe(Checkpoint(locate(str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not description.problems and peak < 5e6, f"{peak / 1e6:.1f} MB"

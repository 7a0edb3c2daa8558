"""Inspect, which reads headers alone, beside what reads the same header and understands nothing of it."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent
from support.bench_formats import gguf_flux
from support.synthetic import flux_header

TITLE = "describing a file from its header, over json.loads of that header, or gguf-py's reader of it"


def cases(folder: Path) -> list[tuple[str, Path, int]]:
    """(what it is read by, file, its tensors): FLUX.1 of real width in FP8, another as deep as models get, a GGUF."""
    fp8 = [(folder / f"{double}.safetensors", double, single) for double, single in ((7, 13), (46, 86))]
    return [*(("json", path, flux_header(path, double, single)) for path, double, single in fp8),
            ("gguf-py", folder / "flux.gguf", gguf_flux(folder / "flux.gguf", 24, 49, 256))]


def measure(reader: str, path: str, tensors: int) -> list[Row]:
    from gguf import GGUFReader

    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate

    def ours() -> Any:
        return describe(Checkpoint(locate(path)))

    def bare() -> Any:
        if reader == "gguf-py":
            return GGUFReader(path)
        with open(path, "rb") as file:
            return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))

    took = spent({"ours": ours, "bare": bare}, 15)
    return [Row(f"{tensors} tensors, over {reader}", took["ours"] / took["bare"], 1 if reader == "gguf-py" else 15),
            Row(f"{tensors} tensors, Python's memory over {reader}", _memory(ours) / _memory(bare), 1.5)]


def _memory(make: Callable[[], Any]) -> int:
    tracemalloc.start()
    make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

"""Timings and memory of writing a model folder; each measurement in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from support.pack import PACK

# A BF16 model of 3 GB in a sparse file, its tensors at most 75 MB, written as FP8 with scales: each piece reads one
# tensor into a buffer and casts it (or takes half of its bytes, which is faster). Prints the growth of the process's peak (VmHWM, in bytes) over the run.
MEMORY = r"""
import json, os, runpy, sys
from pathlib import Path
runpy.run_path(os.path.join(os.environ["PACK"], "__main__.py"), run_name="qt")["import_pack"]()
import torch
from quantized_transformers.makers.builders.writer import write_model
from quantized_transformers.loaders.containers.writing import whole
torch.set_num_threads(1)
folder, count, cast, rows, columns = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "cast", 6144, 6144
source = folder / "source.bin"
with open(source, "wb") as file:
    file.truncate(count * rows * columns * 2)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def make(i):
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    with open(source, "rb", buffering=0) as file:
        file.seek(i * weight.nbytes)
        view = memoryview(weight.view(torch.uint8).numpy().reshape(-1))
        while view:
            view = view[file.readinto(view):]
    codes = weight.to(torch.float8_e4m3fn) if cast else weight.view(torch.float8_e4m3fn)[:, ::2].contiguous()
    return {f"{i}.weight": codes, f"{i}.weight_scale": torch.ones(())}

torch.zeros(8, 8, dtype=torch.bfloat16).to(torch.float8_e4m3fn)  # what torch takes once
pieces = [whole([(f"{i}.weight", "F8_E4M3", (rows, columns)), (f"{i}.weight_scale", "F32", ())],
                lambda i=i: make(i)) for i in range(count)]
before = peak()
done = write_model(folder / "out", pieces, config={}, header={"format": "pt"}, copies={}, sources=[source],
                   shard_bytes=1 << 30)
print(json.dumps({"grown": peak() - before, "source": os.path.getsize(source), "written": done.total_size,
                  "shards": done.shards, "largest": rows * columns * 2}))
"""

# The same bytes (in 8 files' worth of tensors) by the writer, and by plain writes to one file and fsync.
SPEED = r"""
import json, os, runpy, sys, time
from pathlib import Path
runpy.run_path(os.path.join(os.environ["PACK"], "__main__.py"), run_name="qt")["import_pack"]()
import torch
from quantized_transformers.makers.builders.writer import write_model
from quantized_transformers.loaders.containers.writing import whole
how, folder, count, size = sys.argv[1], Path(sys.argv[2]), 32, 32 << 20
tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
import safetensors.torch
start = time.perf_counter()
if how == "writer":
    pieces = [whole([(str(i), "U8", (size,))], lambda i=i: {str(i): tensor}) for i in range(count)]
    write_model(folder / "out", pieces, config={}, header={}, copies={}, sources=[])
else:
    with open(folder / "out", "wb", buffering=0) as file:
        for _ in range(count):
            file.write(tensor.numpy())
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": count * size}))
"""


def run(script: str, *arguments: object) -> dict:
    """The JSON on the last line of what a script prints, in a fresh Python."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PACK": str(PACK)}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def writing(folder: Path, budget: Callable[[str, float, float, str], None], rounds: int = 5) -> None:
    """The writer alone: seconds against plain writes of the same bytes, and memory."""
    import shutil

    print("writing a model folder, against plain writes of the same bytes and one fsync")
    seconds: dict[str, list[float]] = {"writer": [], "plain": []}
    for i in range(rounds):
        for how in ("writer", "plain") if i % 2 else ("plain", "writer"):
            place = folder / f"writing-{how}"
            place.mkdir()
            found = run(SPEED, how, place)
            seconds[how].append(found["seconds"])
            shutil.rmtree(place)
    for how, times in seconds.items():
        print(f"  {how:6}  {median(times):.2f} s, {found['bytes'] / median(times) / 1e9:.2f} GB/s "
              f"({min(times):.2f} .. {max(times):.2f})")
    budget(f"wall, ratio of medians of {rounds}", median(seconds["writer"]) / median(seconds["plain"]), 1.25, "x")
    place = folder / "writing"
    place.mkdir()
    found = run(MEMORY, place, 40, "cast")
    shutil.rmtree(place)
    budget(f"peak memory beyond two largest tensors ({found['source'] / 1e9:.1f} GB of BF16 to FP8)",
           (found["grown"] - 2 * found["largest"]) / 1e6, 200, "MB")


# A FLUX.1-like BF16 folder of random weights, and how fast it becomes FP8: two passes over each weight (scale, codes),
# the output synced to disk. Beside it what the machine takes to copy into fresh pages, before and after: into a fresh
# tensor, and into numpy's memory, which asks the system for huge pages.
BUILD = r"""
import json, os, runpy, sys, time
from pathlib import Path
runpy.run_path(os.path.join(os.environ["PACK"], "__main__.py"), run_name="qt")["import_pack"]()
import numpy, torch
from quantized_transformers.makers.builders.fp8 import build_fp8
folder, base = Path(sys.argv[1]), sys.argv[2]

def copying(how):
    source = torch.ones(256 << 20, dtype=torch.uint8)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        fresh = source.clone() if how == "tensor" else numpy.copy(source.numpy())
        best = max(best, source.nbytes / (time.perf_counter() - start))
        del fresh
    return best

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

torch.zeros(8, 8, dtype=torch.bfloat16).float().to(torch.float8_e4m3fn)
before, kinds = peak(), ("tensor", "huge") if len(sys.argv) < 4 else ()
copied = {how: copying(how) for how in kinds}
start = time.perf_counter()
build_fp8(base_transformer_dir=base, model_type="none", output_dir=str(folder / "out"))
seconds = time.perf_counter() - start
copied = {how: (copied[how] + copying(how)) / 2 for how in kinds}
print(json.dumps({"rate": os.path.getsize(os.path.join(base, "diffusion_pytorch_model.safetensors")) / seconds,
                  "copied": copied, "grown": peak() - before}))
"""


def bf16_base(folder: Path, layers: int, rows: int = 6144, columns: int = 6144, random: bool = True) -> Path:
    """A transformer folder of `layers` BF16 weights; without `random` a sparse file of zeros."""
    import struct

    folder.mkdir()
    size = rows * columns * 2
    header = {f"blocks.{i}.weight": {"dtype": "BF16", "shape": [rows, columns],
                                     "data_offsets": [i * size, (i + 1) * size]} for i in range(layers)}
    text = json.dumps(header).encode()
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if random:
            import torch

            weight = torch.randn(rows, columns).bfloat16().view(torch.uint8)
            for i in range(layers):
                file.write(weight.roll(i, 0).numpy().tobytes())
        file.truncate(8 + len(text) + layers * size)
    (folder / "config.json").write_text('{"_class_name": "Bench"}', encoding="utf-8")
    return folder


def building(folder: Path, budget: Callable[[str, float, float, str], None], rounds: int = 5) -> None:
    """build-fp8 straight from BF16: bytes read a second against copying into fresh pages, and memory."""
    import shutil
    import tempfile

    print("build-fp8 straight from BF16, against copying into fresh pages (all cores against one)")
    fast = Path("/dev/shm")  # what is measured is the builder, not the disk that its output waits for
    there = fast if fast.is_dir() and shutil.disk_usage(fast).free > 2 << 30 else folder
    shares: dict[str, list[float]] = {"tensor": [], "huge": []}
    rates = []
    base = bf16_base(folder / "building-base", 48)
    with tempfile.TemporaryDirectory(dir=there) as temp:
        for i in range(rounds + 1):
            place = Path(temp, "out")
            place.mkdir()
            found = run(BUILD, place, base)
            shutil.rmtree(place)
            if i:  # the first one warms the page cache
                rates.append(found["rate"])
                for how, copied in found["copied"].items():
                    shares[how].append(found["rate"] / copied)
    shutil.rmtree(base)
    text = ", ".join(f"{100 * median(of):.0f} % ({100 * min(of):.0f} .. {100 * max(of):.0f}) of copying into {what}"
                     for of, what in zip(shares.values(), ("a fresh tensor", "huge pages"), strict=True))
    print(f"  {median(rates) / 1e9:.2f} GB/s of BF16: {text}")
    budget(f"copying into a fresh tensor against building, median of {rounds}", 1 / median(shares["tensor"]), 2.5, "x")
    base = bf16_base(folder / "building-base", 40, random=False)
    place = folder / "building"
    place.mkdir()
    found = run(BUILD, place, base, "memory")
    shutil.rmtree(place)
    shutil.rmtree(base)
    budget("peak memory beyond two largest tensors (3.0 GB of BF16)", (found["grown"] - 2 * 6144 * 6144 * 2) / 1e6, 200,
           "MB")

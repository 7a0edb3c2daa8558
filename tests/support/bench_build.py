"""Time and memory of writing model folders and building FP8 ones."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, child, spent

TITLE = "build-fp8 and build-nvfp4 from BF16, over copying as many bytes into fresh memory; the writer, over plain writes of its bytes"
LINUX = True
LARGEST = 6144 * 6144 * 2  # bytes of each tensor of what is built or written for its memory


def cases(folder: Path) -> list[tuple[Path]]:
    fast = Path("/dev/shm")  # what is measured is the builder, not the disk that its output waits for
    return [(fast if fast.is_dir() and shutil.disk_usage(fast).free > 4 << 30 else folder,)]


def measure(there: str) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=there) as temp:
        folder = Path(temp)
        rows = [*_building(folder), _writing(folder)]
        base = bf16_base(folder / "base", 20, random=False)
        (folder / "building").mkdir()
        grown = child(building_memory, folder / "building", base)
        rows.append(Row("building: memory for 1.5 GB of BF16, over its largest tensor", grown / LARGEST, 4.6))
        (folder / "writing").mkdir()
        grown = child(writing_memory, folder / "writing", 20, "cast")["grown"]
        return [*rows, Row("writing: memory for 1.5 GB of BF16, over its largest tensor", grown / LARGEST, 4.6)]


def _building(folder: Path) -> list[Row]:
    """Two passes over each weight (scale, codes), the output synced, against one copy into fresh tensors."""
    import torch

    from quantized_transformers.makers.builders.fp8 import build_fp8
    from quantized_transformers.makers.builders.nvfp4 import build_nvfp4

    base = str(bf16_base(folder / "built-from", 12))
    weight = torch.ones(LARGEST, dtype=torch.uint8)

    def build(how: Callable[..., Any], **options: str) -> None:
        shutil.rmtree(folder / "built", ignore_errors=True)
        how(base_transformer_dir=base, output_dir=str(folder / "built"), **options)

    took = spent({"fp8": lambda: build(build_fp8, model_type="none"), "nvfp4": lambda: build(build_nvfp4),
                  "copy": lambda: [weight.clone() for _ in range(12)]}, 3)
    return [Row("building", took["fp8"] / took["copy"], 4), Row("building NVFP4", took["nvfp4"] / took["copy"], 2)]


def _writing(folder: Path) -> Row:
    import torch

    from quantized_transformers.loaders.containers.writing import whole
    from quantized_transformers.loaders.files.frozen import Frozen
    from quantized_transformers.makers.builders.writer import write_model

    count, size = 16, 32 << 20
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)

    def ours() -> None:
        pieces = [whole([(str(i), "U8", (size,))], lambda i=i: {str(i): tensor}) for i in range(count)]
        write_model(folder / "written", pieces, config={}, header={}, copies={}, sources=Frozen())

    def plain() -> None:
        with open(folder / "plain", "wb", buffering=0) as file:
            for _ in range(count):
                file.write(tensor.numpy())
            os.fsync(file.fileno())

    def clean(name: str) -> None:
        shutil.rmtree(folder / "written", ignore_errors=True)
        (folder / "plain").unlink(missing_ok=True)

    took = spent({"ours": ours, "plain": plain}, 5, clean)
    return Row("writing", took["ours"] / took["plain"], 1.25)


def peak() -> int:
    """The most memory of this process so far (VmHWM), in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def writing_memory(folder: str, count: int, how: str) -> dict[str, Any]:
    """A BF16 model of `count` tensors of 75 MB in a sparse file, written as FP8 with scales: each piece reads one tensor into
    a buffer and casts it ("cast"), or takes half of its bytes ("half", which is faster). `grown`: by how many bytes the
    process's peak grew over the run, which only a process of its own can tell."""
    import torch

    from quantized_transformers.loaders.containers.writing import whole
    from quantized_transformers.loaders.files.frozen import Frozen
    from quantized_transformers.makers.builders.writer import write_model

    rows, columns, source = 6144, 6144, Path(folder, "source.bin")
    with open(source, "wb") as file:
        file.truncate(count * rows * columns * 2)

    def make(i: int) -> dict[str, torch.Tensor]:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        with open(source, "rb", buffering=0) as file:
            file.seek(i * weight.nbytes)
            view = memoryview(weight.view(torch.uint8).numpy().reshape(-1))
            while view:
                view = view[file.readinto(view):]
        codes = weight.to(torch.float8_e4m3fn) if how == "cast" else weight.view(torch.float8_e4m3fn)[:, ::2].contiguous()
        return {f"{i}.weight": codes, f"{i}.weight_scale": torch.ones(())}

    torch.zeros(8, 8, dtype=torch.bfloat16).to(torch.float8_e4m3fn)  # what torch takes once
    pieces = [whole([(f"{i}.weight", "F8_E4M3", (rows, columns)), (f"{i}.weight_scale", "F32", ())],
                    lambda i=i: make(i)) for i in range(count)]
    before = peak()
    done = write_model(Path(folder, "out"), pieces, config={}, header={"format": "pt"}, copies={}, sources=Frozen([source]),
                       shard_bytes=1 << 30)
    return {"grown": peak() - before, "source": os.path.getsize(source), "written": done.total_size, "shards": done.shards,
            "largest": rows * columns * 2}


def building_memory(folder: str, base: str) -> int:
    """By how many bytes the peak of a process of its own grows while it builds FP8 from a BF16 folder."""
    import torch

    from quantized_transformers.makers.builders.fp8 import build_fp8

    torch.zeros(8, 8, dtype=torch.bfloat16).float().to(torch.float8_e4m3fn)  # what torch takes once
    before = peak()
    build_fp8(base_transformer_dir=base, model_type="none", output_dir=str(Path(folder, "out")))
    return peak() - before


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

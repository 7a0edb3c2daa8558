"""What the writers of files have in common for their faults: a tiny run of each, a child that says how it ended, disks
that fill up, sources that change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders import component, output
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.gguf import build_gguf
from quantized_transformers.makers.repack_wan import repack
from quantized_transformers.makers.save import save
from support import crash, flux, modelslim
from support.repack import make_base

REFUSED = 3
tell = os.write  # also where the disk is full
Run = Callable[[], object]


class Writer(NamedTuple):
    """`prepare(sources, target, overwrite)` is done before anything goes wrong, and returns the run that it goes wrong
    in. `make(folder)` makes the sources; those whose names end in `weights` are the ones to change. `mapped`: the run
    has them open from before, so that one which is replaced by name is none of its business."""

    make: Callable[[Path], object]
    prepare: Callable[[Path, Path, bool], Run]
    target: str
    overwrites: bool = True
    weights: str = ".safetensors"
    mapped: bool = False


def _base(folder: Path) -> None:
    """A transformer for the builders that go by names: six layers in two shards."""
    generator = torch.Generator().manual_seed(5)
    folder.mkdir()
    made = {f"blocks.{i}.attn.to_q.{leaf}": torch.randn(shape, generator=generator).bfloat16()
            for i in range(6) for leaf, shape in (("weight", (96, 64)), ("bias", (96,)))}
    names = list(made)
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i * 6:i * 6 + 6] for i in range(2)}
    for file, part in files.items():
        save_file({name: made[name] for name in part}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, part in files.items() for name in part}}), encoding="utf-8")
    (folder / "config.json").write_text('{"_class_name": "TinyTransformer2DModel"}', encoding="utf-8")
    (folder / "LICENSE").write_text("none", encoding="utf-8")


def _fp8(sources: Path, target: Path, overwrite: bool) -> Run:
    return lambda: build_fp8(output_dir=str(target), base_transformer_dir=str(sources), overwrite=overwrite,
                             shard_bytes=24 << 10, progress=lambda total: lambda count: None)


def _gguf(sources: Path, target: Path, overwrite: bool) -> Run:
    return lambda: build_gguf(output=str(target), base=str(sources), overwrite=overwrite,
                              progress=lambda total: lambda count: None)


def _save(sources: Path, target: Path, overwrite: bool) -> Run:
    import folder_paths

    folder_paths.set_output_directory(str(target.parent))
    loaded = model.load(model.Request(str(sources)), quiet=True).patcher
    return lambda: save(loaded, target.name, "stock", overwrite=overwrite, step=lambda count: None)  # what decodes


def _repack(sources: Path, target: Path, overwrite: bool) -> Run:
    return lambda: repack(str(sources / "export"), str(sources / "base"), str(target), link=False,
                          step=lambda count: None)


def _export_and_base(folder: Path) -> None:
    shutil.copytree(modelslim.DATA / "w8a8", folder / "export")
    make_base(folder / "base", modelslim.EXPORTS["w8a8"])


WRITERS = {
    "repack": Writer(_export_and_base, _repack, "out", overwrites=False),
    "build": Writer(_base, _fp8, "out"),
    "gguf": Writer(lambda folder: flux.make(double=1, single=1).save_pretrained(folder), _gguf, "out.gguf"),
    "save": Writer(lambda folder: modelslim.folder("w8a8", folder), _save, "out.safetensors", mapped=True),
}


# --- runs in a fork ---

def end_of(run: Run) -> str | None:
    """How it ends in a forked process: "" when well, else the CheckpointError; None when it has killed itself. Anything
    else is an AssertionError."""
    reading, writing = os.pipe()

    def told() -> None:
        output._ahead.cache_clear()  # whose threads are not in the fork
        component._threads.cache_clear()
        try:
            run()
        except CheckpointError as error:
            tell(writing, str(error).encode())
            os._exit(REFUSED)

    code = crash.in_child(told)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    assert code in (0, REFUSED, -signal.SIGKILL), f"it ended with {code}"
    assert bool(said) == (code == REFUSED)
    return None if code < 0 else said


def measured(run: Run, reads: Path | None = None) -> tuple[int, float]:
    """How many changes on disk a run makes (crash.at_change), and how many seconds it takes."""
    reading, writing = os.pipe()

    def told() -> None:
        start = time.monotonic()
        count = crash.at_change(run, -1, lambda _: None, reads)
        tell(writing, f"{count} {time.monotonic() - start}".encode())

    assert end_of(told) == ""
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        count, seconds = pipe.read().split()
    return int(count), float(seconds)


# --- disks ---

class Disk(NamedTuple):
    """A folder, and what lets only so many more bytes be written into it by this process and its children; whether these
    are all, or those that the system's calls in os write."""

    folder: Path
    limit: Callable[[int | None], None]
    all: bool


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A file system of its own in memory where this user may mount one; else the system's calls that write, counted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False,
                      capture_output=True).returncode:
        counted = _counted()
        try:
            yield Disk(folder, counted, False)
        finally:
            counted(None)
        return

    def limit(count: int | None) -> None:
        used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
        most = (64 << 20) if count is None else used + count
        subprocess.run(["mount", "-o", f"remount,size={max(most, 4096)}", str(folder)], check=True)

    try:
        yield Disk(folder, limit, True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _counted() -> Callable[[int | None], None]:
    import errno

    left: int | None = None
    write, copy, place = os.write, os.copy_file_range, os.pwrite

    def room(wanted: int) -> int:
        nonlocal left
        if left is None:
            return wanted
        if wanted and not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wanted = min(wanted, left)
        left -= wanted
        return wanted

    def limit(count: int | None) -> None:
        nonlocal left
        left = count
        os.write, os.copy_file_range, os.pwrite = (write, copy, place) if count is None else (
            lambda file, data: write(file, memoryview(data)[:room(len(data))]),
            lambda source, to, count: copy(source, to, room(count)),
            lambda file, data, at: place(file, memoryview(data)[:room(len(data))], at))
    return limit


# --- sources ---

def change(path: Path, how: str) -> None:
    """Let a source change."""
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    other = bytearray(data)  # another number in every part of the tensors
    other[first::61] = bytes(byte ^ 1 for byte in data[first::61])
    if how == "truncate":
        os.truncate(path, len(data) * 2 // 5)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "append":
        with open(path, "ab") as file:
            file.write(b"more")
    elif how == "other bytes":
        with open(path, "r+b") as file:
            file.write(other)
    elif how == "touch":
        os.utime(path, ns=(1, 1))
    elif how == "replace":
        beside = path.with_name("beside")
        beside.write_bytes(other)
        beside.rename(path)
    else:
        path.unlink()


HOW = ("truncate", "empty", "append", "other bytes", "touch", "replace", "remove")


def changed_at(run: Run, path: Path, how: str, at: int, reads: Path) -> Run:
    """The run, with a source that changes before its change number `at`."""
    return lambda: crash.at_change(run, at, lambda _: change(path, how), reads)


def changed_after(run: Run, path: Path, how: str, seconds: float) -> Run:
    """The run, with a source that changes at some moment, whatever is being done then."""
    def both() -> None:
        def late() -> None:
            time.sleep(seconds)
            change(path, how)
        thread = threading.Thread(target=late)
        thread.start()
        try:
            run()
        finally:
            thread.join()
    return both

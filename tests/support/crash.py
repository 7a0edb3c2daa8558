"""Runs that kill themselves with SIGKILL at a chosen change on disk, in a fork of this process: nothing is imported anew."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.makers.publish import TIDYING

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}  # os.rename is os.replace, too


def in_child(run: Callable[[], object]) -> int:
    """What `run` ends with in a forked process: 0, 1 for an exception (shown on stderr), or minus the signal."""
    child = os.fork()
    if not child:
        try:
            gc.disable()  # it would look at, and so copy, all that this process has
            torch.set_num_threads(1)  # the threads of OpenMP's pool are not in a fork: waiting for them never ends
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_change(run: Callable[[], object], at: int, then: Callable[[Callable[[], object]], object],
              reads: Path | None = None) -> int:
    """Run it in this process, which is good for nothing else afterwards; at its change number `at`, before it, `then` is
    called with what does a part of it. Returns how many there were.

    A change is a file that is opened for writing, renamed, removed, linked or synced, a folder made, renamed or
    removed, and a write of bytes, of which half is a part; with `reads` also a file below that folder that is opened.
    """
    count = 0

    def change(partly: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            then(partly)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or event == "open" and (
                isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
                or reads and isinstance(arguments[0], str) and Path(arguments[0]).is_relative_to(reads)):
            change()

    write, sync, copy, place = os.write, os.fsync, os.copy_file_range, os.pwrite

    def writes(file: int, data: Any) -> int:
        change(lambda: write(file, memoryview(data)[:len(data) // 2]))
        return write(file, data)

    def places(file: int, data: Any, at: int) -> int:
        change(lambda: place(file, memoryview(data)[:len(data) // 2], at))
        return place(file, data, at)

    def syncs(file: int) -> None:
        change()
        sync(file)

    def copies(source: int, to: int, count: int) -> int:
        change(lambda: copy(source, to, count // 2))
        return copy(source, to, count)

    os.write, os.fsync, os.copy_file_range, os.pwrite = writes, syncs, copies, places
    sys.addaudithook(hook)
    run()
    return count


def die(partly: Callable[[], object]) -> None:
    partly()
    os.kill(os.getpid(), signal.SIGKILL)


def killed(run: Callable[[], object], at: int) -> bool:
    """Whether `run`, in a fork, came to its change number `at`; before it, with a part of it done, it is killed."""
    code = in_child(lambda: at_change(run, at, die))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def refuse_to_load(*references: Path) -> None:
    """Assert that none of these is taken for a checkpoint."""
    for reference in references:
        for component in ("transformer", "transformer_2"):
            try:
                found = Checkpoint(locate(str(reference), component=component))
            except CheckpointError:
                continue
            raise AssertionError(f"{reference} loads ({component}): {found.source.files}")


def everything_in(*folders: Path) -> Iterable[Path]:
    """The folders, hidden ones too, and all folders and weight files in them."""
    for top in folders:
        if top.is_dir():
            yield top
            yield from (path for path in top.rglob("*") if path.is_dir() or path.name.endswith(".safetensors"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name; the marker, too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def tidied() -> None:
    """Wait for what a refusal has left to a thread (publish.py)."""
    for thread in threading.enumerate():
        if thread.name == TIDYING:
            thread.join()


def reset(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

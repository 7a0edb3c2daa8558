"""Runs that kill themselves with SIGKILL at a chosen change on disk, in a fork of this process: nothing is imported anew."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}  # os.rename is os.replace, too


def in_child(run: Callable[[], object]) -> int:
    """What `run` ends with in a forked process: 0, 1 for an exception (shown on stderr), or minus the signal."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the threads of OpenMP's pool are not in a fork: waiting for them never ends
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(run: Callable[[], object], at: int) -> bool:
    """Whether `run`, in a fork, came to its change number `at`; before it, it is killed.

    A change is a file that is opened for writing, renamed, removed, linked or synced, a folder made, renamed or
    removed, and a write of bytes; of the last one, half is written before the kill.
    """
    left = at

    def change(partly: Callable[[], object] | None = None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            if partly:
                partly()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
            change()

    def armed() -> None:
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

    code = in_child(armed)
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


def reset(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

"""One weight file, written layer by layer, that appears whole or not at all.

Until it is complete it is called `.<name>.part`, which no loader lists or opens, and it is locked. Then it is synced to
the disk and renamed. What a killed run leaves is taken over by the next one for the same name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...host.texts import Text
from ...loaders.containers.writing import Layout, NotWritten, Piece, lay_out, write_at, write_piece
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Frozen
from ...loaders.words import size
from ..publish import sync_folder
from .target import refuse_existing


def write(target: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], *, sources: Frozen | None = None,
          overwrite: bool = False, check: Callable[[str], None] = lambda path: None,
          step: Callable[[int], None] = lambda amount: None) -> None:
    """Write `target`, a safetensors file, from `pieces`; see `write_laid_out`."""
    layout = lay_out([tensor for piece in pieces for tensor in piece.tensors], metadata)
    write_laid_out(target, layout, pieces, sources=sources, overwrite=overwrite, check=check, step=step)


def write_laid_out(target: Path, layout: Layout, pieces: Sequence[Piece], *, sources: Frozen | None = None,
                   overwrite: bool = False, check: Callable[[str], None] = lambda path: None,
                   step: Callable[[int], None] = lambda amount: None) -> None:
    """Write `target`, laid out so, from `pieces`, one in memory at a time. `check` is called with the path of the
    complete file before it gets its name, and may raise; `step` with the bytes of tensors that are written. `sources`
    are the files that the pieces are made from.

    Raises CheckpointError for a source that changes meanwhile, a full disk or one that cannot be written to, another
    run at work on the same name, and a layer that makes other tensors than it declared. Whatever is raised, the file
    under construction is removed and what was at `target` stays.
    """
    part, sources = target.with_name(f".{target.name}.part"), sources or Frozen()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, target) as file:
            try:
                _check_space(target, layout.bytes)
                file.truncate(0)
                write_at(file.fileno(), 0, layout.head)
                for piece in pieces:
                    with sources.held(piece.tensors[0].name if piece.tensors else ""):
                        write_piece(file.fileno(), layout, piece, step)
                file.truncate(layout.bytes)  # what a layout leaves free at the end
                os.fsync(file.fileno())
                with sources.held():
                    check(str(part))
                sources.check()
                refuse_existing(target, overwrite)
                if os.name == "nt":  # which does not rename an open file
                    file.close()
                os.replace(part, target)
                sync_folder(target.parent)
            except BaseException:  # Cancel too
                if os.name == "nt":
                    file.close()
                with suppress(OSError):
                    part.unlink()
                raise
    except (OSError, NotWritten) as error:
        cause = error.error if isinstance(error, NotWritten) else error
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(Text("cannot write the file: {why}", why=cause.strerror or cause),
                              cause.filename or target,
                              Text("make space on the disk, or choose another one") if full else
                              Text("check the folder and its rights")) from error


def _check_space(target: Path, need: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise CheckpointError(Text("the file needs {needed}, {free} are free", needed=size(need), free=size(free)),
                              target.parent, Text("make space, or choose another disk"))


@contextmanager
def _locked(part: Path, target: Path) -> Iterator[IO[bytes]]:
    """The file under construction, open and ours alone. Raises CheckpointError when another process writes it."""
    with open(part, "r+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666)) as file:
        try:
            import fcntl
        except ImportError:  # Windows: does not rename a file that another process has open
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        except (BlockingIOError, FileNotFoundError):
            ours = False  # or the other run has just finished, and what is open is its result
        if not ours:
            raise CheckpointError(Text("another run is writing this file"), target,
                                  Text("wait for it, or give another name"))
        yield file


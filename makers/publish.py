"""New model folders that appear whole or not at all, whatever stops the tool that writes them (kill -9, power loss).

All work is in a hidden folder beside the target, `.<name>.unfinished`, one process at a time:

    .quantized-transformers-unfinished   the marker; locked by the process that works here
    content/                             what becomes the target, with a marker of its own from the start
    previous/                            the old target while it is exchanged

A folder with a marker, and everything below it, is refused by this pack (unfinished.py, where references are
resolved). The content becomes the target by one rename, still marked; taking the marker away is the commit. Weight
files are called `.part` until all are whole, for programs that do not know the marker.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..host.texts import Text
from ..loaders.errors import CheckpointError
from ..loaders.files.frozen import Changed
from ..loaders.files.unfinished import MARKER

PART = ".part"
TIDYING = "qt-tidy"
Step = Callable[[int], None]
_TEXT = ("This folder is unfinished: run the tool that writes it again, it goes on where it stopped.\nA folder called "
         "'previous' in here is the one that was to be replaced: keep it, the tool puts it back.\n")
_REMOVED = "removed"


def target_folder(output: str, inputs: Sequence[Path], overwrite: bool = False) -> Path:
    """The folder that `output` names; a relative one is below this pack's model folder. Nothing is changed on disk, but
    where it is refused for what is in it, and that is the work of a run that was killed after it had published it, what
    else that has left is removed.

    Raises CheckpointError unless it is new, empty or an interrupted run's, no link, and neither in one of `inputs`
    (files or folders) nor around one. With `overwrite` it may also be a folder of one model: config.json and weights,
    no folders in it.
    """
    text = output.strip()
    path = Path(text).expanduser()
    if not text or ".." in path.parts or "\0" in text:
        raise CheckpointError(Text("an output folder must not contain '..'") if text else
                              Text("no output folder is given"), text, Text("give the full path of a new folder"))
    if not path.is_absolute():
        path = Path(next(iter(host.model_folders()), os.getcwd()), path)
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise CheckpointError(Text("the output is a link or a file"), path, Text("give the full path of a new folder"))
    real = Path(os.path.realpath(path))
    try:
        _refuse_full(real, overwrite)
    except CheckpointError:
        _tidy(real)
        raise
    for folder in inputs:
        top = Path(os.path.realpath(folder))
        if real.is_relative_to(top) or top.is_relative_to(real):
            raise CheckpointError(Text("the output folder and an input lie in each other"), path,
                                  Text("give a folder outside {folder}", folder=folder))
    return real


def _refuse_full(target: Path, overwrite: bool) -> None:
    names = os.listdir(target) if target.exists() else []
    if not names or MARKER in names:
        return
    if not overwrite:
        raise CheckpointError(Text("the output folder is not empty"), target,
                              Text("give a new folder; nothing is overwritten"))
    model = "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if not model or any(entry.is_dir() for entry in os.scandir(target)):
        raise CheckpointError(Text("the output folder is not that of one model (config.json, weights and no folders), "
                                   "so it is not overwritten"), target,
                              Text("give a new folder, or remove this one yourself"))


def _tidy(target: Path) -> None:
    """Remove what is left beside a folder that a killed run has published: in a thread, for a prompt is checked on the
    server's only one, and an old model takes a while to go."""
    left = _work(target)
    if not left.folder.is_dir() or left.content.exists():  # there is nothing, or a run that goes on
        return

    def remove() -> None:
        with suppress(CheckpointError), work_folder(target):  # which refuses the target, too, once it has tidied up
            pass

    thread = threading.Thread(target=remove, name=TIDYING)
    thread.start()
    thread.join(0.1)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable (not on Windows, which does it by itself)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class Work:
    """The hidden folder of one run: `content` becomes `target`; `folder` is around it.

    `resumable` says whether what is there after an exception is of use to the next run, or is removed (as it is where a
    source changed).
    """

    target: Path
    folder: Path
    content: Path
    previous: Path
    overwrite: bool
    resumable: bool = True

    def clear(self) -> None:
        """Begin anew, with an empty content."""
        if self.content.exists():
            shutil.rmtree(self.content)  # below the marker of the work folder
        _mark(self.content)

    def reopen(self, names: Collection[str]) -> None:
        """Give the weight files among `names` (relative to content) their unfinished name back."""
        for name in names:
            done, part = self.content / name, self.content / (name + PART)
            if done.is_file() and not part.exists():
                done.rename(part)

    def check_space(self, need: int) -> None:
        """Raise CheckpointError unless `need` bytes in all fit on the disk, those of the content included."""
        from ..loaders.words import size  # which imports what imports this

        there = sum(path.stat().st_size for path in self.content.rglob("*")
                    if path.is_file() and not path.is_symlink())
        free = shutil.disk_usage(self.content).free
        if need - there > free:
            raise CheckpointError(Text("the new folder needs {needed} more, {free} are free", needed=size(need - there),
                                       free=size(free)), self.target.parent,
                                  Text("make space, or choose another disk"))

    def publish(self, names: Collection[str]) -> None:
        """Let the content be the target. `names` are the files to take `.part` from; all files must be on disk."""
        for name in names:
            part = self.content / (name + PART)
            if part.exists():
                part.rename(self.content / name)
        for folder in (*(path for path in self.content.rglob("*") if path.is_dir()), self.content):
            sync_folder(folder)
        _refuse_full(self.target, self.overwrite)
        if self.target.exists() and any(self.target.iterdir()):
            self.target.rename(self.previous)
            sync_folder(self.folder)
        elif self.target.exists():
            self.target.rmdir()
        try:
            self.content.rename(self.target)
        except OSError:
            if self.previous.exists():
                self.previous.rename(self.target)
            raise
        sync_folder(self.target.parent)
        (self.target / MARKER).unlink()
        sync_folder(self.target)


@contextmanager
def work_folder(target: Path, overwrite: bool = False) -> Iterator[Work]:
    """The work of one run on `target`, for one process at a time; removed when the block ends well.

    A run that was killed is brought to a plain state first: what it had under the target's name is content again, an
    old target that it had put aside is back. An exception in the block leaves everything for the next run, unless the
    block has said that the work is not `resumable`.

    Raises CheckpointError when another process works on this target, when the hidden folder is not this pack's, and
    for a target that may not be replaced. OSErrors are turned into a CheckpointError that names the file.
    """
    work = _work(target, overwrite)
    folder = work.folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink() or folder.exists() and not (folder / MARKER).is_file() and (
                not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(Text("the folder for unfinished work exists, and is not this tool's"), folder,
                                  Text("remove it"))
        folder.mkdir(exist_ok=True)
        with open(folder / MARKER, "a", encoding="utf-8") as mark:
            _lock(mark, folder / MARKER, target)
            if not mark.tell():
                mark.write(_TEXT)
                mark.flush()
            _recover(work)
            end = not work.content.exists()  # what an earlier run has published needs nothing any more
            try:
                _refuse_full(target, overwrite)
                end = False
                _mark(work.content)
                yield work
                end = True
            except BaseException as error:
                end |= not work.resumable or isinstance(error, Changed)
                raise
            finally:
                if end:
                    _sweep(work)
    except OSError as error:
        raise unwritable(error, target) from error


def _work(target: Path, overwrite: bool = False) -> Work:
    folder = target.parent / f".{target.name}.unfinished"
    return Work(target, folder, folder / "content", folder / "previous", overwrite)


def unwritable(error: OSError, where: object, what: str = "") -> CheckpointError:
    """The refusal that stands for an OSError while writing `what`; the next run goes on from there."""
    why = error.strerror or error
    return CheckpointError(Text("cannot write {what}: {why}", what=what, why=why) if what else
                           Text("cannot write: {why}", why=why), error.filename or where,
                           Text("check space and rights, then run this again: it goes on where it stopped"))


def _mark(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / MARKER).write_text(_TEXT, encoding="utf-8")


def _lock(mark, path: Path, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(mark.fileno()), os.stat(path)):  # else another run has just finished
            return
    raise CheckpointError(Text("another run writes this folder"), target, Text("wait for it"))


def _recover(work: Work) -> None:
    """Undo a publication that was stopped before its commit, or end one that was stopped after it."""
    if (work.folder / _REMOVED).exists():
        shutil.rmtree(work.folder / _REMOVED)
    if os.path.lexists(work.target / MARKER):
        if work.content.exists():
            shutil.rmtree(work.content)
        work.target.rename(work.content)
    if not work.previous.exists():
        return
    if not work.target.exists():
        work.previous.rename(work.target)
    elif not work.content.exists():
        _drop_previous(work)  # the new one has taken its place
    elif any(work.target.iterdir()):
        raise CheckpointError(Text("the folder that was to be replaced is still here, and its place is taken"),
                              work.previous,
                              Text("keep one of the two: move this one away, or {target}", target=work.target))
    else:
        work.target.rmdir()
        work.previous.rename(work.target)


def _sweep(work: Work) -> None:
    """Remove the hidden folder; what it is recognised by goes last."""
    _drop_previous(work)
    for path in work.folder.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # on Windows the marker is open: an empty work folder stays, and is taken by the next run
        (work.folder / MARKER).unlink()
        work.folder.rmdir()


def _drop_previous(work: Work) -> None:
    """Remove the replaced folder, under another name: what is half removed is never put back."""
    if work.previous.exists():
        work.previous.rename(work.folder / _REMOVED)
        shutil.rmtree(work.folder / _REMOVED)

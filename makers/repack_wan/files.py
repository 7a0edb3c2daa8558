"""Files written so that an interrupted run can go on: what is there is compared with what should be, and continued."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...host.texts import Text
from ...loaders.files.frozen import Changed
from ..publish import Step

CHUNK = 16 << 20  # bytes between two looks at Cancel


class File(NamedTuple):
    """A file to write: `head`, then `data` bytes of `source` from byte `start` on. `name` is relative to the target."""

    name: str
    head: bytes
    source: Path | None = None
    start: int = 0
    data: int = 0
    link: bool = False  # a link to `source` instead

    @property
    def size(self) -> int:
        """Bytes it takes (a link takes none)."""
        return 0 if self.link else len(self.head) + self.data


def place_link(link: Path, to: Path) -> bool:
    """Make `link` show the file `to`: a symbolic link, else a hard link. Returns whether one of them works here."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    for make in (os.symlink, os.link):
        with suppress(OSError, NotImplementedError):
            make(to, link)
            return True
    return False


def write(path: Path, file: File, step: Step) -> int:
    """Write `file` to `path`, after what is there already and right. Returns how many bytes were right.

    The bytes there are compared with the source, all of them; from the first that differs on they are written again.
    Tensor data go from file to file inside the kernel where the system can. `step` is called with the bytes done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "x+b") as out:
        good = _same(out, file, step)
        out.seek(good)
        out.truncate()
        if good < len(file.head):
            out.write(file.head[good:])
            step(len(file.head) - good)
        out.flush()
        if file.source:
            _copy(out.fileno(), file, max(good, len(file.head)), step)
        os.fsync(out.fileno())
        if os.fstat(out.fileno()).st_size != file.size:
            raise Changed(str(file.source), Text("it ends too early"))
    return good


def _same(out, file: File, step: Step) -> int:
    """How many of the first bytes of `out` are those of `file`."""
    there = out.read(len(file.head))
    good = len(os.path.commonprefix([there, file.head]))
    step(good)
    if good < len(file.head) or file.source is None:
        return good
    with open(file.source, "rb") as source:
        source.seek(file.start)
        while True:
            ours, theirs = out.read(CHUNK), source.read(min(CHUNK, file.size - good))
            if ours != theirs:
                cut = len(ours) if theirs.startswith(ours) else 0
                step(cut)
                return good + cut
            if not ours:
                return good
            good += len(ours)
            step(len(ours))


def _copy(out: int, file: File, at: int, step: Step) -> None:
    """Append the source's bytes from position `at` of the new file on."""
    assert file.source is not None
    source = os.open(file.source, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        place, left = file.start + at - len(file.head), file.size - at
        in_kernel = getattr(os, "copy_file_range", None)
        os.lseek(out, at, os.SEEK_SET)
        os.lseek(source, place, os.SEEK_SET)
        while left > 0:
            count = 0
            if in_kernel is not None:
                try:
                    count = in_kernel(source, out, min(CHUNK, left))
                except OSError:  # another file system, or one that cannot
                    count = 0
                if not count:
                    in_kernel = None
                    continue
            else:
                data = os.read(source, min(CHUNK, left))
                while data:
                    done = os.write(out, data)
                    count, data = count + done, data[done:]
                if not count:
                    return  # the size is checked by the caller
            left -= count
            step(count)
    finally:
        os.close(source)

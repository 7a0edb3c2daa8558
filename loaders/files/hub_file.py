"""A file of a hub on its way: hashed while it is written, continued where an earlier download stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class RemoteFile:
    """A file as its hub lists it: size in bytes and its digest, sha256, or git's blob sha1 for small ones of Hugging
    Face."""

    size: int
    digest: str

    def hasher(self) -> Any:
        """What its digest is made with; a git blob's begins with its size."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    def is_at(self, path: Path, step: Callable[[int], None]) -> bool:
        """Whether a file on disk is this one, by its bytes. `step(bytes)` is called with each block."""
        hasher = self.hasher()
        _feed(hasher, path, step)
        return hasher.hexdigest() == self.digest


def _feed(hasher: Any, path: Path, step: Callable[[int], None]) -> None:
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
            step(len(block))


class HashedFile:
    """The file that a download is written into: hashes it, moves the progress bar, hears Cancel (`step(bytes)`, called
    with each step's). It takes no byte behind the listed size."""

    def __init__(self, raw: BinaryIO, path: Path, file: RemoteFile, step: Callable[[int], None]) -> None:
        self._raw, self._path, self._file, self.step = raw, path, file, step
        if raw.tell() > file.size:
            raw.truncate(0)
        self._restart()

    def _restart(self) -> None:
        """Begin with the hash of what is on disk already."""
        self._raw.flush()
        self._hash = self._file.hasher()
        _feed(self._hash, self._path, self.step)

    def write(self, data: bytes) -> None:
        data = data[:max(self._file.size - self.tell(), 0)]
        self.step(len(data))  # raises when the user has cancelled
        self._hash.update(data)
        self._raw.write(data)

    def tell(self) -> int:
        self._raw.seek(0, os.SEEK_END)
        return self._raw.tell()

    def truncate(self, size: int) -> None:
        """A server that ignored the range sends the file from its start."""
        self._raw.truncate(size)
        self._restart()

    def digest(self) -> str:
        return self._hash.hexdigest()

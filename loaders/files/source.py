"""Local files of one component, and JSON files among them."""

from __future__ import annotations

import os
import stat
from typing import IO, Any, NamedTuple

from ...host.texts import Text
from ..errors import CheckpointError


class Source(NamedTuple):
    """Local files of one component. `files` is empty when only its configuration was asked for, or it has none."""

    reference: str
    folder: str
    files: tuple[str, ...]
    config: str | None = None
    index_file: str | None = None
    choice: str = ""  # why these files, where the folder held more
    beside: str | None = None  # config.json beside a single file: read for its quantization declaration only
    texts: tuple[str, ...] = ()  # as Selection's
    companions: tuple[Source, ...] = ()  # other components of its pipeline that are of one model with it in ComfyUI

    @property
    def paths(self) -> list[str]:
        """Every file this source depends on, for fingerprints."""
        own = (*self.files, self.config, self.index_file, self.beside, *self.texts)
        return [path for path in (*own, *(path for one in self.companions for path in one.paths)) if path]


def read_json(path: str, name: str = "") -> dict[str, Any]:
    """A JSON object from a file, held against what files of its `name` are (kinds.py), if it has another one here.

    Raises CheckpointError when it is unreadable, no object, or what strict.py or kinds.py refuse.
    """
    from . import kinds, strict  # with the first file: ComfyUI imports this module at every start

    largest, most = kinds.limits(name or path)
    value = strict.parse(read_file(path, largest), path, largest=largest, most=most)
    if not isinstance(value, dict):
        raise CheckpointError(Text("this JSON file holds no object"), path, strict.AGAIN)
    kinds.check(value, path, name or path)
    return value


def read_file(path: str, largest: int) -> bytes:
    """The bytes of a small file, one more than `largest` at most. Raises CheckpointError when it is unreadable."""
    try:
        with open_file(path) as file:
            return file.read(largest + 1)
    except OSError as error:
        raise CheckpointError(Text("cannot read the file: {problem}", problem=error.strerror), path,
                              Text("check the path and its rights")) from error


def open_file(path: str) -> IO[bytes]:
    """An ordinary file, to be read. Raises OSError, and CheckpointError for a pipe or a device, which never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(Text("this is no ordinary file"), path, Text("give the path of a file"))
    return open(path, "rb")

"""Local files of one component, and JSON files among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is unreadable, invalid or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(Text("cannot read the file: {problem}", problem=error.strerror), path,
                              Text("check the path and its rights")) from error
    except ValueError as error:
        raise CheckpointError(Text("invalid JSON: {error}", error=error), path,
                              Text("download the file again")) from error
    if not isinstance(value, dict):
        raise CheckpointError(Text("this JSON file holds no object"), path, Text("download the file again"))
    return value

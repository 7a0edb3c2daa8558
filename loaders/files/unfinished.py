"""The mark of a folder that a tool of this pack has not finished: such a folder is never read."""

from __future__ import annotations

import os
from pathlib import Path

from ...host.texts import Text
from ..errors import CheckpointError

MARKER = ".quantized-transformers-unfinished"
_ABOVE = 3  # how many folders above the one of a file are looked at


def refuse_unfinished(path: Path) -> None:
    """Raise CheckpointError when `path`, or what it is a link to, is in a folder that a tool has not finished."""
    for place in dict.fromkeys((Path(os.path.realpath(path)), Path(os.path.abspath(path)))):
        top = [place, *place.parents][1:] if place.is_file() else [place, *place.parents]
        for folder in top[:1 + _ABOVE]:
            if os.path.lexists(folder / MARKER):
                raise CheckpointError(Text("this folder is unfinished: the tool that writes it was stopped"), folder,
                                      Text("run the tool again: it goes on where it stopped; or delete the folder"))

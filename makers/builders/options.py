"""What users write: sizes of files, and patterns one a line."""

from __future__ import annotations

import re

from ...host.texts import Text
from ...loaders.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12, "KIB": 1 << 10, "MIB": 1 << 20,
          "GIB": 1 << 30, "TIB": 1 << 40}
SHARD_SIZE = "5GB"  # as diffusers and nvidia-modelopt have it


def shard_bytes(text: str) -> int:
    """Bytes of a size such as 5GB, 500 MB or 4GiB. Raises CheckpointError for anything else, and for less than 1."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found[2].upper()) if found else None
    if not found or factor is None or float(found[1]) * factor < 1:
        raise CheckpointError(Text("{text!r} is no size of a file", text=text), "",
                              Text("write it as 5GB, 500MB or 4GiB"))
    return int(float(found[1]) * factor)


def one_a_line(text: str) -> list[str]:
    """Patterns of a multi-line input, blank lines left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]

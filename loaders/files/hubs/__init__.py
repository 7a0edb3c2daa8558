"""The hubs that repos are downloaded from: one module each, called as its KEY, as base.Hub says, and a name here.

A reference may name its hub ("modelscope:owner/name"). One that does not is looked for in the caches of all, and
downloaded from the one that has it, where that is known (known.py), else from the one that QT_HUB prefers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

from ....host.texts import Text
from ...errors import CheckpointError
from ..selection import WEIGHTS
from .known import HUBS

if TYPE_CHECKING:
    from .base import Hub

MODULES = ("huggingface", "modelscope")
PREFERRED = "QT_HUB"


def split(reference: str) -> tuple[str, str]:
    """(key of the hub that a reference names, or empty, and the rest of it)."""
    key, colon, rest = reference.partition(":")
    return (key, rest) if colon and key in MODULES else ("", reference)


def named(key: str = "") -> list[Hub]:
    """The hub of a key; all of them, in the order in which their caches are looked into, without one."""
    return [cast("Hub", import_module(f".{name}", __package__)) for name in MODULES if key in ("", name)]


def preferred() -> str:
    """The key that QT_HUB gives. Raises CheckpointError for one that is no hub's."""
    key = os.environ.get(PREFERRED, "").strip().lower() or MODULES[0]
    if key not in MODULES:
        raise CheckpointError(Text("{variable} is none of {hubs}", variable=PREFERRED, hubs=", ".join(MODULES)),
                              repr(key[:80]), Text("correct or unset it"))
    return key


def known(reference: str) -> tuple[str, ...]:
    """The keys of the hubs that have a repo; empty where that is not known."""
    key, text = split(reference)
    return (key,) if key else HUBS.get("/".join(text.split("/")[:2]), ())


def source(reference: str, prefer: str = "") -> tuple[Hub, str]:
    """The hub that a reference is downloaded from, and the reference without its prefix. `prefer` wins over QT_HUB."""
    there, wanted = known(reference), prefer or preferred()
    hub, = named(there[0] if there and wanted not in there else wanted)
    return hub, split(reference)[1]


def command(reference: str, revision: str, patterns: Sequence[str], prefer: str = "") -> str:
    """The line that fetches the files of a load into the cache of its hub, by the hub's own tool."""
    hub, text = source(reference, prefer)
    parts = PurePosixPath(text).parts
    below = "/".join(parts[2:])
    includes = [f"{below}/{pattern}" if below else pattern for pattern in patterns]
    if below.endswith((*WEIGHTS, ".json")):
        includes = [below]
    return hub.command("/".join(parts[:2]), revision, includes)

"""A hub's list of a repo's files, as anybody can write one: taken only when, of all that could be downloaded, every
name can be a file's on any system, every size a file's, and every digest one. What is odd of other kinds is left
out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeGuard

from ....host.texts import Text
from ...errors import CheckpointError
from ...words import first_ten
from ..hub_file import RemoteFile
from ..selection import strange_name
from ..stores import READ
from .http import StrangeError

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST = 1 << 60  # bytes of a file


def files(hub: str, repo: str, items: Iterable[tuple[Any, Any, Any]]) -> dict[str, RemoteFile]:
    """By name, from (name, size, digest) of each. Raises CheckpointError for names, sizes and digests that are none."""
    found: dict[str, RemoteFile] = {}
    unsafe: list[Any] = []
    sizes: list[str] = []
    twice: list[str] = []
    for name, size, digest in items:
        digest = digest.lower() if isinstance(digest, str) else ""
        read = not isinstance(name, str) or name.lower().endswith(READ)
        if not isinstance(name, str) or strange_name(name) or not _DIGEST.fullmatch(digest):
            unsafe += [name] if read else []
        elif type(size) is not int or not 0 <= size <= _MOST:
            sizes += [name] if read else []
        elif found.setdefault(name, file := RemoteFile(size, digest)) != file:
            twice.append(name)
    if unsafe:
        raise _refused(Text("{hub} lists files with unsafe names or hashes: {files}", hub=hub, files=_shown(unsafe)),
                       repo)
    if sizes:
        raise _refused(Text("{hub} lists files without a size: {files}", hub=hub, files=_shown(sizes)), repo)
    if twice:
        raise _refused(Text("{hub} lists files twice, as different ones: {files}", hub=hub, files=_shown(twice)), repo)
    return found


def objects(value: Any) -> list[dict[str, Any]]:
    """A list of objects; None is an empty one. Raises StrangeError for anything else."""
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise StrangeError(Text("it has no list of files"))
    return value


def is_commit(value: Any) -> TypeGuard[str]:
    """Whether it is the name of a commit."""
    return isinstance(value, str) and bool(_COMMIT.fullmatch(value))


def no_commit(hub: str, repo: str, said: Any) -> CheckpointError:
    """The error for a repo whose commit is not told, and what is said instead."""
    return CheckpointError(Text("{hub} names no commit for {repo}", hub=hub, repo=repo), repr(said)[:80],
                           Text("try again later"))


def _refused(what: str, repo: str) -> CheckpointError:
    return CheckpointError(what, repo, Text("do not use this repo; nothing of it was written"))


def _shown(names: Iterable[Any]) -> str:
    return first_ten(repr(name)[:80] for name in names)

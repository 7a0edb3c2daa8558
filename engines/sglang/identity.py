"""What a server serves, as one line that it is named by: SGLang itself tells nobody which override it runs.

    qt:BASE@12 hex+transformer=REF@12 hex+transformer_2=REF@12 hex+lora=REF*0.8

It is `--served-model-name`, so `/v1/models` gives it back. The hex of a repo is its commit's. That of files on this
machine is a SHA-256 of what the server reads of them (`mark_of`): content decides, not the place. A part without it
matches any of its name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.files.selection import WEIGHTS

SCHEME = "qt:"
ROLES = ("transformer", "transformer_2")
DIGITS = 12
MIDDLE = 64 << 10  # bytes of a weight file, from its middle: two fine-tunes have one header
WHOLE = 1 << 20  # of a smaller file all bytes count
_PLAIN = "/:._-~()"  # what stands for itself in a name; + @ = * and % have a meaning here
_PART = re.compile(r"(?P<name>[^@+=*]+)(?:@(?P<mark>[0-9a-f]{12}))?")
SNAPSHOT = re.compile(r"(?:models--)?(?P<repo>[^/]+?--[^/]+)/snapshots/(?P<revision>[^/]+)(?:/(?P<below>.*))?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Part(NamedTuple):
    """A reference, and what tells one version of it from another; empty where that is not known."""

    name: str
    mark: str = ""

    def __str__(self) -> str:
        name = quote(self.name, safe=_PLAIN)
        return f"{name}@{self.mark}" if self.mark else name

    def matches(self, other: Part) -> bool:
        """Whether both can mean the same files."""
        return self.name == other.name and (not self.mark or not other.mark or self.mark == other.mark)


class Identity(NamedTuple):
    """A base; what replaces its transformers, by role; LoRAs that the server starts with, and their strengths."""

    base: Part
    overrides: tuple[tuple[str, Part], ...] = ()
    loras: tuple[tuple[Part, float], ...] = ()

    def __str__(self) -> str:
        return "".join(
            [
                SCHEME,
                str(self.base),
                *(f"+{role}={part}" for role, part in self.overrides),
                *(f"+lora={part}*{strength:g}" for part, strength in self.loras),
            ]
        )

    def matches(self, other: Identity) -> bool:
        """Whether both can mean the same files at the same strengths."""
        mine, theirs = dict(self.overrides), dict(other.overrides)
        return (
            self.base.matches(other.base)
            and mine.keys() == theirs.keys()
            and all(part.matches(theirs[role]) for role, part in mine.items())
            and len(self.loras) == len(other.loras)
            and all(
                a.matches(b) and f"{s:g}" == f"{t:g}" for (a, s), (b, t) in zip(self.loras, other.loras, strict=True)
            )
        )


def parse(text: str) -> Identity | None:
    """The identity that a server is named by; None for any other name."""
    base, *rest = text.removeprefix(SCHEME).split("+")
    first = _part(base)
    if not text.startswith(SCHEME) or first is None:
        return None
    overrides, loras = [], []
    for piece in rest:
        role, _, value = piece.partition("=")
        name, star, strength = value.partition("*")
        part = _part(name)
        if part is None or bool(star) != (role == "lora") or role not in (*ROLES, "lora"):
            return None
        if role == "lora":
            try:
                loras.append((part, float(strength)))
            except ValueError:
                return None
        else:
            overrides.append((role, part))
    return Identity(first, tuple(overrides), tuple(loras))


def _part(text: str) -> Part | None:
    found = _PART.fullmatch(text)
    return Part(unquote(found["name"]), found["mark"] or "") if found else None


def part_of(path: str | os.PathLike[str], files: Iterable[str]) -> Part:
    """What a reference that was found at `path` is called: a repo in a hub's cache by its id and commit, anything else
    by its last name and the mark of its `files`, which are those that the server reads."""
    path = Path(os.path.abspath(path))
    found = SNAPSHOT.search(path.as_posix())
    name = path.name
    if found:
        below = f"/{found['below']}" if found["below"] else ""
        name = found["repo"].replace("--", "/", 1) + below
        if _COMMIT.fullmatch(found["revision"]):
            return Part(name, found["revision"][:DIGITS])
    return Part(name, mark_of(path, files))


def mark_of(root: Path, files: Iterable[str]) -> str:
    """12 hex of the SHA-256 over these files: a line a file, by name, of its name below `root`, its size, and the
    SHA-256 of its bytes; of a large file those of its header and 64 KiB from its middle.

    Raises CheckpointError where one cannot be read.
    """
    top, lines = root if root.is_dir() else root.parent, []
    for file in {Path(os.path.abspath(file)) for file in files}:
        try:
            name = file.relative_to(top).as_posix()
        except ValueError:
            name = file.name
        try:
            size, digest = file.stat().st_size, hashlib.sha256()
            with open(file, "rb") as stream:
                if size <= WHOLE:
                    digest.update(stream.read())
                else:
                    digest.update(_header(stream.read(8), stream, file))
                    stream.seek((size - MIDDLE) // 2)
                    digest.update(stream.read(MIDDLE))
        except OSError as error:
            raise CheckpointError(
                Text("cannot read the file: {problem}", problem=error.strerror),
                file,
                Text("check the path and its rights"),
            ) from error
        lines.append(f"{name}\0{size}\0{digest.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:DIGITS]


def _header(start: bytes, stream: BinaryIO, file: Path) -> bytes:
    """The bytes of a safetensors header, or the first MIDDLE of any other file."""
    count = int.from_bytes(start, "little") if file.suffix.lower() in WEIGHTS[:2] else MIDDLE
    return start + stream.read(min(count, 100 << 20))  # safetensors' own limit

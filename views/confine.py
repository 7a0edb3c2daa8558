"""References that come in over HTTP: only what lies in the model folders and the caches of the hubs.

Nodes take any path on the machine, because whoever may queue a prompt may read through the host's own loaders, too.
Routes are asked without a prompt, by anything that reaches the port, so they look nowhere else and follow no link that
leads out. Sizes of what would be parsed are limited as well: a parser holds the interpreter for as long as it runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..host.texts import Text
from ..loaders.containers import gguf
from ..loaders.errors import CheckpointError
from ..loaders.families import families
from ..loaders.files import hubs
from ..loaders.files.places import candidates, cleaned
from ..loaders.files.selection import INDEX, PIPELINE, WEIGHTS, leaves_folder

MAX_TEXT = 1024  # characters of a reference, a revision or a name
MAX_ENTRIES = 20_000  # files and folders below one reference
MAX_JSON = 4_000_000  # bytes of JSON in one piece: published headers and indexes stay below 1 MB
MAX_HEADERS = 20_000_000  # bytes of all headers of a checkpoint
DEPTH = 4  # as far below a folder as sources.LocalFolder looks
_DRIVE = re.compile(r"[A-Za-z]:")


class OutsideError(CheckpointError):
    """A path outside of the folders that a route may read."""


class TooLargeError(CheckpointError):
    """More than a route reads."""


@dataclass(frozen=True)
class Places:
    """Where a reference is, in order of preference, and a hash of every file there (path, size, time)."""

    paths: tuple[Path, ...]
    stamp: str


def roots() -> tuple[str, ...]:
    """The real paths of ComfyUI's folders of models and text encoders, and of the hubs' caches."""
    folders = [*host.model_folders(), *host.text_folders()]
    for hub in hubs.named():
        with suppress(ImportError):
            folders.append(str(hub.root()))
    return tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders))


def confined(reference: str, revision: str = "", weights_name: str = "") -> Places:
    """Where a reference is, after proving that nothing of it lies outside. `paths` is empty when it is nowhere.

    Raises OutsideError for an absolute path, a link, '..' or a drive letter that leads out, TooLargeError for folders
    of more than MAX_ENTRIES entries and JSON of more than MAX_JSON bytes, CheckpointError for what is no reference.
    """
    for text in (reference, revision, weights_name):
        if len(text) > MAX_TEXT or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
            raise CheckpointError(Text("this is no reference: it is too long, or has control characters"),
                                  repr(text[:80]), Text("give a name of the list, or a repo id owner/name"))
    allowed = roots()
    _refuse_outside_names(reference, revision, weights_name, allowed)
    try:
        found = list(dict.fromkeys(Path(os.path.abspath(path)) for path in candidates(reference, revision)))
    except OSError as error:  # a name that the file system does not take
        raise CheckpointError(Text("this is no reference: {reason}", reason=error.strerror), repr(reference[:80]),
                              Text("correct it")) from error
    stamps = hashlib.sha256()
    for path in found:
        for line in _walk(path, allowed):
            stamps.update(line.encode("utf-8", "surrogateescape"))
    return Places(tuple(found), stamps.hexdigest())


def check_headers(paths: Iterable[str], limit: int = MAX_JSON) -> None:
    """Raise TooLargeError for a safetensors file whose header says that it is longer than `limit` bytes, and for files
    whose headers take more than MAX_HEADERS together."""
    total = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                start = file.read(8)
                size = os.fstat(file.fileno()).st_size
        except OSError:
            continue  # the reader says what is wrong with it
        if start.startswith(gguf.MAGIC):  # its header is read piece by piece
            continue
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        total += length if length <= size - 8 else 0
        if limit < length <= size - 8 or total > MAX_HEADERS:
            raise TooLargeError(Text("its header takes {length:,} bytes, more than the {limit:,} that are read here",
                                     length=length, limit=limit), path,
                                Text("look at it with the node Inspect Checkpoint"))


def _refuse_outside_names(reference: str, revision: str, weights_name: str, allowed: tuple[str, ...]) -> None:
    _, text = hubs.split(cleaned(reference))
    slashed = text.replace("\\", "/")
    outside = leaves_folder(revision) or leaves_folder(weights_name) or ".." in slashed.split("/")
    if os.path.isabs(text) or slashed.startswith("/"):
        near = [os.path.abspath(folder) for folder in (*host.model_folders(), *host.text_folders())]
        near += allowed
        outside = outside or not any(_below(os.path.abspath(text), folder) for folder in near)
    else:
        outside = outside or text.startswith((".", "~")) or bool(_DRIVE.match(text))
    if outside:
        raise OutsideError(Text("paths outside of the model folders are not looked at"), repr(text[:200]),
                           Text("put it into a model folder, or name its folder in extra_model_paths.yaml"))


def _below(path: str, folder: str) -> bool:
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _inside(path: str, allowed: tuple[str, ...]) -> str:
    """The real path. Raises OutsideError when it is in no allowed folder."""
    real = os.path.realpath(path)
    if not any(_below(real, folder) for folder in allowed):
        raise OutsideError(Text("a path leads out of the model folders"), repr(os.path.basename(path)),
                           Text("name the folder that it leads to in extra_model_paths.yaml"))
    return real


def _walk(path: Path, allowed: tuple[str, ...]) -> Iterator[str]:
    """One line for each file that a reader of `path` could open."""
    real = _inside(str(path), allowed)
    if os.path.isdir(real):
        yield from _walk_folder(str(path), allowed, DEPTH + 1, [MAX_ENTRIES])
        return
    yield _line(str(path), allowed)
    family = path.name.endswith(INDEX) or any(family.reads_beside(str(path)) for family in families())
    for name in sorted(os.listdir(path.parent)):  # what single files are read together with
        if name == "config.json" or _side_file(name) or family and name.endswith((*WEIGHTS, ".json")):
            yield _line(str(path.parent / name), allowed)


def _walk_folder(folder: str, allowed: tuple[str, ...], depth: int, left: list[int]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    left[0] -= len(found)
    if left[0] < 0:
        raise TooLargeError(Text("the folder holds more than {most:,} entries", most=MAX_ENTRIES),
                            repr(os.path.basename(folder)), Text("give the folder of the checkpoint itself"))
    for entry in found:
        if entry.is_symlink():
            _inside(entry.path, allowed)
        if not entry.is_dir():
            yield _line(entry.path, allowed)
        elif depth and not entry.name.startswith("."):
            yield from _walk_folder(entry.path, allowed, depth - 1, left)


def _line(path: str, allowed: tuple[str, ...]) -> str:
    """What a file is stamped with. Raises OutsideError for a link out, TooLargeError for JSON that is read whole."""
    if os.path.islink(path):
        _inside(path, allowed)
    try:
        stat = os.stat(path)
    except OSError:  # a link to nothing
        return f"{path} -\n"
    name = os.path.basename(path)
    whole = name in (PIPELINE, "config.json") or name.endswith(".index.json") or _side_file(name)
    if whole and stat.st_size > MAX_JSON:
        raise TooLargeError(Text("{name} takes {size:,} bytes, more than the {limit:,} that are read here", name=name,
                                 size=stat.st_size, limit=MAX_JSON), path, Text("download it again"))
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"


def _side_file(name: str) -> bool:
    return any(family.side_file(name) for family in families())

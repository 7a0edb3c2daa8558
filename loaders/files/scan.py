"""What the model folders hold: one walk for all who ask, kept until a folder, or JSON that was read, has another time.

Names and the small JSON files that say what a folder is; no weight file is opened.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from ... import host
from .selection import PIPELINE
from .strict import Invalid, decode

CONFIG = "config.json"
DEPTH = 4  # folders below a model folder
# Bytes and values of JSON, which is read where ComfyUI lists its nodes, in its event loop. Published: less than 100 kB.
_MAX_JSON, _MOST = 400_000, 20_000
# Times of folders are as coarse as 2 s (FAT): what has changed so shortly before a walk may change again unseen.
_FRESH = 2_000_000_000


class Folder(NamedTuple):
    """A folder: the names of its files and folders, and what `model_index.json` and `config.json` in it say. The parts
    of a pipeline are not asked for theirs."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    said: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Root:
    """A model folder and what ComfyUI calls it. `folders`: path below it with forward slashes ("" is itself) -> Folder,
    those above first; none where it is not there. The same object for as long as nothing in it changes."""

    path: str
    kinds: tuple[str, ...]
    folders: Mapping[str, Folder]

    def below(self, name: str) -> Iterator[tuple[str, Folder]]:
        """(path below `name`, folder) of those in it."""
        return ((path[len(name) + 1:], folder) for path, folder in self.folders.items()
                if path.startswith(f"{name}/"))


@dataclass(frozen=True)
class _Walk:
    root: Root
    times: Mapping[str, int]  # of every folder that was entered, and of all JSON that was read; 0 for what is not there
    settled: bool  # whether whatever changes from now on has another time

    def holds(self) -> bool:
        return self.settled and all(map(_is_of, self.times.items()))


T = TypeVar("T")
_walks: dict[str, _Walk] = {}
_made: dict[Callable[[tuple[Root, ...]], Any], tuple[tuple[Root, ...], Any]] = {}
_lock = threading.RLock()


def of_roots(make: Callable[[tuple[Root, ...]], T]) -> T:
    """What `make` (a function of a module) makes of the folders of models and text encoders as they are now: the same
    object for as long as nothing in them changes. Safe in any thread.

    While ComfyUI lists its nodes, it is looked once.
    """
    with _lock:
        roots = host.once("quantized_transformers", _roots)
        made = _made.get(make)
        if made is None or made[0] != roots:
            made = _made[make] = roots, make(roots)
        return made[1]


def _roots() -> tuple[Root, ...]:
    kinds = host.folder_kinds()
    paths = dict.fromkeys([*host.model_folders(), *host.text_folders()])
    return tuple(_look(path, tuple(kinds.get(path, ()))) for path in paths)


def _look(path: str, kinds: tuple[str, ...]) -> Root:
    kept = _walks.get(path)
    if kept is None or kept.root.kinds != kinds or not kept.holds():
        walk = _walk(path, kinds)
        if kept is not None and kept.root == walk.root:  # what is made of it stands
            walk = _Walk(kept.root, walk.times, walk.settled)
        kept = _walks[path] = walk
    return kept.root


def _walk(root: str, kinds: tuple[str, ...]) -> _Walk:
    begun = time.time_ns()
    folders: dict[str, Folder] = {}
    times: dict[str, int] = {}

    def enter(path: str, name: str, depth: int, above: tuple[tuple[int, int], ...], part: bool) -> None:
        try:
            stat = os.stat(path)  # before its entries: what changes in between is seen the next time
            times[path] = stat.st_mtime_ns
            if (stat.st_dev, stat.st_ino) in above and stat.st_ino:
                return  # a link to a folder around it
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            times.setdefault(path, 0)
            return
        inner = tuple(entry.name for entry in found if entry.name[0] != "." and _is(entry.is_dir))
        files = tuple(entry.name for entry in found if _is(entry.is_file))
        said = {}
        for file in (PIPELINE, CONFIG):
            if file in files and not part:
                times[os.path.join(path, file)], said[file] = _read(os.path.join(path, file))
        folders[name] = Folder(files, inner, said)
        for one in inner if depth else ():
            enter(os.path.join(path, one), f"{name}/{one}" if name else one, depth - 1,
                  (*above, (stat.st_dev, stat.st_ino)), part or PIPELINE in files)

    enter(root, "", DEPTH, (), False)
    settled = all(abs(begun - then) > _FRESH for then in times.values())
    return _Walk(Root(root, kinds, folders), times, settled)


def _is_of(known: tuple[str, int]) -> bool:
    """Whether a path has the time that it had."""
    path, then = known
    try:
        return os.stat(path).st_mtime_ns == then
    except OSError:
        return then == 0


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _read(path: str) -> tuple[int, Mapping[str, Any]]:
    """(time, object) of a JSON file; an empty object for what holds none, which whoever loads it says."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, {}
    then = stat.st_mtime_ns
    if stat.st_size > _MAX_JSON:
        return then, {}
    coarse = then % 1_000_000_000 == 0 and abs(time.time_ns() - then) <= _FRESH
    read = _parsed.__wrapped__ if coarse else _parsed
    return then, read(path, then, stat.st_size, stat.st_ino)


@lru_cache(4096)
def _parsed(path: str, time: int, size: int, inode: int) -> Mapping[str, Any]:
    """The object in a JSON file that has these facts: a walk again reads what has changed alone."""
    try:
        with open(path, "rb") as file:
            value = decode(file.read(_MAX_JSON + 1), largest=_MAX_JSON, most=_MOST)
    except (OSError, Invalid):
        return {}
    return value if isinstance(value, dict) else {}

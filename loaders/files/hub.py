"""Downloads from a hub: the files of one load, at one commit, each proven by its hash, into a cache or a model folder.

What the hubs' own clients do not do (hubs/ has what their servers say): a file becomes visible only after its hash was
checked, an interrupted file is continued by a later load, Cancel works, and no answer takes more than was listed.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from ... import host
from ...host.texts import Text
from ..errors import CheckpointError
from ..words import first_ten, size
from . import hubs
from .hub_file import HashedFile
from .hubs.base import Hub, Listing
from .hubs.failures import explained
from .hubs.http import RefusedError
from .selection import Folder, Selection, not_of_files, parts, strange_name
from .source import read_json
from .stores import READ, Store

logger = logging.getLogger(__name__)
# (hub, repo, revision) -> where its files go
Where = Callable[[Hub, str, str], Store]


@dataclass(frozen=True)
class Watcher:
    """Who hears of a download: `progress(bytes)` returns the function that is called with each step's bytes and may
    raise to end it, `file(name)` is told which file comes next. Gated repos are refused but for those in `licences`
    (None: all were accepted). `listings` is what hubs have answered: asked once for all loads of one watcher."""

    progress: Callable[[int], Callable[..., None]]
    file: Callable[[str], None] = lambda name: None
    licences: frozenset[str] | None = None
    listings: dict[tuple[str, str, str], Listing] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `fetch` would download: sizes by file name (None: the hub does not show them without access), those of them
    that are not there yet by path, whether the repo is gated, the page of its licence, and the folder; names are those
    below `root`."""

    hub: str
    repo: str
    commit: str
    files: dict[str, int] | None
    missing: dict[Path, int]
    gated: bool
    page: str
    folder: Path
    root: Path


def fetch(reference: str, revision: str, select: Callable[[Folder], Sequence[Selection]], patterns: Sequence[str],
          watcher: Watcher | None = None, where: Where | None = None, prefer: str = "") -> Path:
    """Download the files that `select` chooses from a repo and return the local folder (or file) of `reference`.

    `reference` is owner/name with an optional subfolder or file behind it and an optional hub in front, `patterns` the
    globs of the line that does the same by hand, `where` the place (the hub's cache), `prefer` the hub of a reference
    without one (QT_HUB's). Files that are there already are not fetched again. Raises CheckpointError: no such repo, no
    access, no network, no space, unsafe names, a hash that does not match. Raises the host's interruption when the user
    cancels. `watcher` hears of it instead of the node that runs.
    """
    watcher = watcher or Watcher(host.progress)
    with _opened(reference, revision, patterns, watcher, where, prefer) as remote:
        if remote.gated and watcher.licences is not None and remote.repo not in watcher.licences:
            raise remote.hub.gated(remote.repo, hubs.command(reference, revision, patterns, prefer))
        remote.download(_chosen(remote, select))
        return remote.store.path(remote.asked)


def plan(reference: str, revision: str, select: Callable[[Folder], Sequence[Selection]], patterns: Sequence[str],
         watcher: Watcher | None = None, where: Where | None = None, prefer: str = "") -> Plan:
    """What `fetch` would download. Asks the hub for its list of files and reads an index where the choice needs it, but
    leaves nothing on the disk. Raises CheckpointError as `fetch` does."""
    with TemporaryDirectory(prefix="qt-plan-") as scratch, \
            _opened(reference, revision, patterns, watcher or Watcher(lambda total: lambda amount=1: None), where,
                    prefer, Path(scratch)) as remote:
        def planned(files: dict[str, int] | None, missing: dict[Path, int]) -> Plan:
            return Plan(remote.hub.KEY, remote.repo, remote.commit, files, missing, remote.gated,
                        remote.hub.page(remote.repo), remote.store.folder, remote.store.path(""))

        try:
            names = _chosen(remote, select)
        except RefusedError as error:
            if error.kind == "access":
                return planned(None, {})
            raise
        sizes = {name: remote.files[name].size for name in remote.full(names)}
        paths = {name: remote.store.path(name) for name in sizes}
        return planned(sizes, {paths[name]: size for name, size in sizes.items() if not paths[name].is_file()})


def _chosen(remote: Repo, select: Callable[[Folder], Sequence[Selection]]) -> list[str]:
    """The names that `select` takes, or the file that the reference names."""
    if remote.below in remote.files:
        names = list(parts(remote.below, remote.files, remote.repo))
        remote.below = ""
        return names
    return [name for selection in select(remote) for name in selection.names]


@contextmanager
def _opened(reference: str, revision: str, patterns: Sequence[str], watcher: Watcher, where: Where | None, prefer: str,
            scratch: Path | None = None) -> Iterator[Repo]:
    """The repo of a reference, while no other process downloads from it; what goes wrong as a CheckpointError. With
    `scratch`, a folder for what is only looked at, nothing is downloaded and nothing waited for."""
    hub, text = hubs.source(reference, prefer)
    command = hubs.command(reference, revision, patterns, prefer)
    parts = PurePosixPath(text).parts
    repo, below = "/".join(parts[:2]), "/".join(parts[2:])
    if revision and strange_name(revision):
        raise CheckpointError(Text("this is no revision"), repr(revision[:80]), Text("give a branch, tag or commit"))
    if strange_name("/".join(parts)) or not_of_files("--".join(("models", *parts[:2]))):
        raise CheckpointError(Text("this is no repo id: it is too long, or no name of files"), repr(text[:80]),
                              Text("correct it"))
    store = where(hub, repo, revision) if where else hub.cache(repo, revision)
    try:
        with nullcontext() if scratch else _locked(store.lock, watcher):
            yield Repo(hub, repo, revision, store, below, watcher, scratch)
    except CheckpointError:
        raise
    except OSError as error:
        raise _of_disk(error, store, command) or explained(hub, error, repo, revision, command) from error


def _of_disk(error: OSError, store: Store, command: str) -> CheckpointError | None:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return CheckpointError(Text("the disk is full"),
                               store.folder,
                               Text("free some space, or {elsewhere}; what has arrived is kept. By hand: {command}",
                                    elsewhere=store.elsewhere, command=command))
    if isinstance(error, PermissionError) or error.errno == 30:  # EROFS
        return CheckpointError(Text("cannot write into {place}: {problem}", place=store.title,
                                    problem=error.strerror), store.folder,
                               Text("correct its rights, or {elsewhere}. By hand: {command}", elsewhere=store.elsewhere,
                                    command=command))
    return None


class Repo:
    """A repo at one commit, as selection.py sees a folder. Making one asks the hub for its list of files."""

    def __init__(self, hub: Hub, repo: str, revision: str, store: Store, below: str, watcher: Watcher,
                 scratch: Path | None) -> None:
        """Raises CheckpointError when the list holds a name that could be written outside the store."""
        self.hub, self.repo, self.store, self.watcher, self.scratch = hub, repo, store, watcher, scratch
        self.asked = self.below = below
        wanted = store.pinned() or revision
        key = (hub.KEY, repo, wanted)
        if key not in watcher.listings:
            watcher.listings[key] = hub.listing(repo, wanted or None, watcher.progress(0))
        self.commit, self.files, self.gated = (found := watcher.listings[key]).commit, found.files, found.gated
        store.open(self.commit, self.files)

    @property
    def place(self) -> str:
        return "/".join(part for part in (self.repo, self.below) if part)

    def names(self, below: str = "") -> list[str]:
        prefix = "".join(f"{part}/" for part in (self.below, below) if part)
        return [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]

    def read_json(self, name: str) -> dict[str, Any]:
        full, = self.full([name])
        path = self.store.path(full)
        if self.scratch is None:
            self.download([name])
        elif not path.is_file():
            path = self.scratch / self.files[full].digest
            if not path.is_file():
                self._arrive(full, path, lambda amount: None)
        return read_json(str(path), name)

    def full(self, names: Sequence[str]) -> list[str]:
        """Names below `below` as names in the repo, each once."""
        return list(dict.fromkeys(f"{self.below}/{name}" if self.below else name for name in names))

    def download(self, names: Sequence[str]) -> None:
        """Fetch files by name below `below`, in this order; those at hand are skipped."""
        full = self.full(names)
        strange = [name for name in full if not name.lower().endswith(READ)]
        if strange:
            raise CheckpointError(Text("files of this kind are not downloaded: {files}", files=first_ten(strange)),
                                  self.repo, Text("only {kinds} files are", kinds=", ".join(READ)))
        spelled = Counter(map(str.casefold, full))
        same = [name for name in full if spelled[name.casefold()] > 1]
        if same:  # one file on some systems
            raise CheckpointError(Text("names that only differ in capitals: {files}", files=first_ten(same)), self.repo,
                                  Text("do not use this repo; nothing of it was written"))
        absent = [name for name in full if not self.store.path(name).is_file()]
        if not absent:
            return
        sizes = {name: self.files[name].size for name in absent}
        here = sum(min(partial.stat().st_size, sizes[name]) for name in absent
                   if (partial := self.store.partial(name)).exists())
        needed, free = sum(sizes.values()) - here, shutil.disk_usage(existing(self.store.folder)).free
        if needed > free:
            raise CheckpointError(Text("{needed} are needed and {free} are free", needed=size(needed),
                                       free=size(free)), self.store.folder,
                                  Text("free some space, or {elsewhere}", elsewhere=self.store.elsewhere))
        logger.info("downloading %s at %s: %d files, %s", self.repo, self.commit[:8], len(absent), size(needed))
        step = self.watcher.progress(sum(sizes.values()))
        self.store.begin(step)  # first, so that a load that goes on takes the same commit
        for name in absent:
            self.watcher.file(name)
            self._one(name, step)

    def _one(self, name: str, step: Callable[[int], None]) -> None:
        """One file: continue what is there, check its hash, then show it."""
        if self.store.has(name):
            step(self.files[name].size)
        else:
            self._arrive(name, self.store.partial(name), step)
        self.store.show(name)

    def _arrive(self, name: str, partial: Path, step: Callable[[int], None]) -> None:
        file = self.files[name]
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as raw:
            target = HashedFile(raw, partial, file, step)
            if target.tell() < file.size:
                self.hub.transfer(self.repo, name, self.commit, file, target)
        if target.digest() != file.digest:
            partial.unlink()
            raise CheckpointError(Text("{name} arrived damaged: its hash is not the one that {hub} lists", name=name,
                                       hub=self.hub.TITLE), self.repo,
                                  Text("it was thrown away; try again, or take another network or mirror"))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextmanager
def _locked(path: Path, watcher: Watcher) -> Iterator[None]:
    """One download of a repo at a time on this machine; waiting can be cancelled."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    step = watcher.progress(0)
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            step(0)
    try:
        yield
    finally:
        lock.release()

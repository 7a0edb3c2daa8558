"""Downloads from the Hugging Face Hub into its cache: the files of one load, at one commit, each proven by its hash.

huggingface_hub does the talking (endpoint, token, offline switch, redirects, retries, resuming inside a call). Three
things are done here because it does not do them: a file becomes visible in the cache only after its hash was checked,
an interrupted file is continued by a later load (its own downloads start over), and Cancel works.
The cache's layout (blobs, snapshots, refs) is the documented one, so every other tool sees the same files.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ... import host
from ..errors import CheckpointError
from ..words import first_ten
from .hub_errors import explained, gated
from .hub_file import HashedFile, RemoteFile
from .selection import TEXT_SUFFIXES, WEIGHTS, Folder, Selection, leaves_folder, parts
from .source import read_json

logger = logging.getLogger(__name__)
SUFFIXES = (*WEIGHTS, *TEXT_SUFFIXES)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Watcher:
    """Who hears of a download: `progress(bytes)` returns the function that is called with each step's bytes and may
    raise to end it, `file(name)` is told which file comes next. Gated repos are refused without `licence_accepted`."""

    progress: Callable[[int], Callable[..., None]]
    file: Callable[[str], None] = lambda name: None
    licence_accepted: bool = True


@dataclass(frozen=True)
class Plan:
    """What `fetch` would download: sizes by file name (None: the Hub does not show them without access), how many
    bytes of them are not in the cache, and whether the repo is gated."""

    repo: str
    commit: str
    files: dict[str, int] | None
    missing: int | None
    gated: bool


def fetch(reference: str, revision: str, select: Callable[[Folder], Sequence[Selection]], command: str,
          watcher: Watcher | None = None) -> Path:
    """Download the files that `select` chooses from a repo and return the local folder (or file) of `reference`.

    `reference` is owner/name with an optional subfolder or file behind it, `command` the line that does the same by
    hand. Files that are already in the cache are not fetched again. Raises CheckpointError: no such repo, no access, no
    network, no space, unsafe names, a hash that does not match. Raises the host's interruption when the user cancels.
    `watcher` hears of it instead of the node that runs.
    """
    watcher = watcher or Watcher(host.progress)
    with _opened(reference, revision, command, watcher) as remote:
        if remote.gated and not watcher.licence_accepted:
            raise gated(remote.repo, command)
        remote.download(_chosen(remote, select))
        return Path(remote.snapshot, *PurePosixPath(reference).parts[2:])


def plan(reference: str, revision: str, select: Callable[[Folder], Sequence[Selection]], command: str) -> Plan:
    """What `fetch` would download. Asks the Hub for its list of files, and fetches an index where the choice needs it.

    Raises CheckpointError as `fetch` does, and while another process downloads from this repo.
    """
    from huggingface_hub.errors import GatedRepoError

    with _opened(reference, revision, command, Watcher(lambda total: lambda amount=1: None), wait=False) as remote:
        try:
            names = _chosen(remote, select)
        except GatedRepoError:
            return Plan(remote.repo, remote.commit, None, None, True)
        sizes = {name: remote.files[name].size for name in remote.full(names)}
        missing = sum(size for name, size in sizes.items() if not (remote.snapshot / name).is_file())
        return Plan(remote.repo, remote.commit, sizes, missing, remote.gated)


def _chosen(remote: Repo, select: Callable[[Folder], Sequence[Selection]]) -> list[str]:
    """The names that `select` takes, or the file that the reference names."""
    if remote.below in remote.files:
        names = list(parts(remote.below, remote.files, remote.repo))
        remote.below = ""
        return names
    return [name for selection in select(remote) for name in selection.names]


@contextmanager
def _opened(reference: str, revision: str, command: str, watcher: Watcher, wait: bool = True) -> Iterator[Repo]:
    """The repo of a reference, while no other process downloads from it; what goes wrong as a CheckpointError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    parts = PurePosixPath(reference).parts
    repo, below = "/".join(parts[:2]), "/".join(parts[2:])
    store = Path(constants.HF_HUB_CACHE, "--".join(("models", *parts[:2])))
    # The base class of its HTTP errors is that of the HTTP library it uses, which differs between versions.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        with _locked(Path(constants.HF_HUB_CACHE, ".locks", store.name, "quantized_transformers.lock"), watcher, wait):
            yield Repo(repo, revision, store, below, watcher)
    except CheckpointError:
        raise
    except failures as error:
        raise explained(error, repo, revision, store, command) from error
    except ValueError as error:  # an id or revision that huggingface_hub does not accept, a file too large for HTTP
        raise CheckpointError(f"the Hub does not serve this: {error}", reference, f"run: {command}") from error


class Repo:
    """A repo at one commit, as selection.py sees a folder. Making one asks the Hub for its list of files."""

    def __init__(self, repo: str, revision: str, store: Path, below: str = "", watcher: Watcher | None = None) -> None:
        """Raises CheckpointError when the list holds a name that could be written outside the cache."""
        from huggingface_hub import HfApi

        self.repo, self.store, self.below = repo, store, below
        self.watcher = watcher or Watcher(host.progress)
        if leaves_folder(revision):
            raise CheckpointError("this is no revision", revision, "give a branch, tag or commit")
        # What the cache already holds of this revision decides the commit, so that all its files belong together.
        known = store / "refs" / (revision or "main")
        wanted = known.read_text(encoding="utf-8").strip() if known.is_file() else revision or None
        info = HfApi().model_info(repo, revision=wanted, files_metadata=True)
        self.commit = info.sha or ""
        self.gated = bool(info.gated)
        if not _COMMIT.fullmatch(self.commit):
            raise CheckpointError(f"the Hub names no commit for {repo}", self.commit, "try again later")
        self.snapshot = store / "snapshots" / self.commit
        self.ref = None if revision == self.commit else known
        self.files: dict[str, RemoteFile] = {}
        unsafe = []
        for item in info.siblings or []:
            digest = (item.lfs.sha256 if item.lfs else item.blob_id) or ""
            if leaves_folder(item.rfilename) or not (_COMMIT.fullmatch(digest) or _SHA256.fullmatch(digest)):
                unsafe.append(item.rfilename)
            self.files[item.rfilename] = RemoteFile(item.size or 0, digest)
        if unsafe:
            raise CheckpointError(f"the Hub lists files with unsafe names or hashes: {first_ten(map(repr, unsafe))}",
                                  repo, "do not use this repo; nothing of it was written")

    @property
    def place(self) -> str:
        return "/".join(part for part in (self.repo, self.below) if part)

    def names(self, below: str = "") -> list[str]:
        prefix = "".join(f"{part}/" for part in (self.below, below) if part)
        return [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]

    def read_json(self, name: str) -> dict[str, Any]:
        self.download([name])
        return read_json(str(Path(self.snapshot, self.below, name)))

    def full(self, names: Sequence[str]) -> list[str]:
        """Names below `below` as names in the repo, each once."""
        return list(dict.fromkeys(f"{self.below}/{name}" if self.below else name for name in names))

    def download(self, names: Sequence[str]) -> None:
        """Fetch files by name below `below`, in this order; those at hand are skipped."""
        full = self.full(names)
        strange = [name for name in full if not name.lower().endswith(SUFFIXES)]
        if strange:
            raise CheckpointError(f"files of this kind are not downloaded: {first_ten(strange)}", self.repo,
                                  f"only {', '.join(SUFFIXES)} files are")
        absent = [name for name in full if not (self.snapshot / name).is_file()]
        if not absent:
            return
        blobs = self.store / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        partial = {name: blobs / f"{self.files[name].digest}.incomplete" for name in absent}
        sizes = {name: self.files[name].size for name in absent}
        here = sum(min(path.stat().st_size, sizes[name]) for name, path in partial.items() if path.exists())
        needed, free = sum(sizes.values()) - here, shutil.disk_usage(blobs).free
        if needed > free:
            raise CheckpointError(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", self.store,
                                  "free some space, or move the cache with HF_HOME")
        logger.info("downloading %s at %s: %d files, %.2f GB", self.repo, self.commit[:8], len(absent), needed / 1e9)
        step = self.watcher.progress(sum(sizes.values()))
        if self.ref is not None and not self.ref.is_file():  # first, so that a load that goes on takes the same commit
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.ref, self.commit)
        for name in absent:
            self.watcher.file(name)
            self._one(name, partial[name], step)

    def _one(self, name: str, partial: Path, step: Callable[[int], None]) -> None:
        """One file: continue what is there, check its hash, then show it in the snapshot."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        file = self.files[name]
        blob = partial.with_suffix("")
        if not blob.is_file():
            with open(partial, "ab") as raw:
                target = HashedFile(raw, partial, file, step)
                if target.tell() < file.size:
                    http_get(hf_hub_url(self.repo, name, revision=self.commit), target,  # type: ignore[arg-type]
                             resume_size=target.tell(), expected_size=file.size, displayed_filename=name,
                             headers=build_hf_headers())
            if target.digest() != file.digest:
                partial.unlink()
                raise CheckpointError(f"{name} arrived damaged: its hash is not the one that the Hub lists", self.repo,
                                      "it was thrown away; try again, or take another network or mirror")
            os.replace(partial, blob)
        else:
            step(file.size)
        _show(blob, self.snapshot / name)


def _show(blob: Path, pointer: Path) -> None:
    """Put a checked blob into the snapshot: a relative link, or the file itself where links are not allowed."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if pointer.is_symlink():  # left behind by a cache whose blob was deleted
        pointer.unlink()
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        os.replace(blob, pointer)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _locked(path: Path, watcher: Watcher, wait: bool) -> Iterator[None]:
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
            if not wait:
                raise CheckpointError("this repo is being downloaded already", path.parent.name,
                                      "wait until that is done") from None
            step(0)
    try:
        yield
    finally:
        lock.release()

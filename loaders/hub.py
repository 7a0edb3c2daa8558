"""Downloads from the Hugging Face Hub into its cache: the files of one load, at one commit, each proven by its hash.

huggingface_hub does the talking (endpoint, token, offline switch, redirects, retries, resuming inside a call). Three
things are done here because it does not do them: a file becomes visible in the cache only after its hash was checked,
an interrupted file is continued by a later load (its own downloads start over), and Cancel works.
The cache's layout (blobs, snapshots, refs) is the documented one, so every other tool sees the same files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .. import host
from .errors import CheckpointError, first_ten
from .selection import TEXT_SUFFIXES, Folder, Selection, leaves_folder
from .sources import read_json

logger = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".sft", *TEXT_SUFFIXES)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: size in bytes and its digest, sha256 for large files, git's blob sha1 for others."""

    size: int
    digest: str

    def hasher(self) -> Any:
        """What its digest is made with; a git blob's begins with its size."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


def fetch(reference: str, revision: str, select: Callable[[Folder], Sequence[Selection]], command: str) -> Path:
    """Download the files that `select` chooses from a repo and return the local folder (or file) of `reference`.

    `reference` is owner/name with an optional subfolder or file behind it, `command` the line that does the same by
    hand. Files that are already in the cache are not fetched again. Raises CheckpointError: no such repo, no access, no
    network, no space, unsafe names, a hash that does not match. Raises the host's interruption when the user cancels.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    parts = PurePosixPath(reference).parts
    repo, below = "/".join(parts[:2]), "/".join(parts[2:])
    store = Path(constants.HF_HUB_CACHE, "--".join(("models", *parts[:2])))
    # The base class of its HTTP errors is that of the HTTP library it uses, which differs between versions.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        with _locked(Path(constants.HF_HUB_CACHE, ".locks", store.name, "quantized_transformers.lock")):
            remote = Repo(repo, revision, store, below)
            if below in remote.files:
                selections: Sequence[Selection] = [Selection("", (below,))]
                remote.below = ""
            else:
                selections = select(remote)
            remote.download([name for selection in selections for name in selection.names])
            return Path(remote.snapshot, *parts[2:])
    except CheckpointError:
        raise
    except failures as error:
        raise _explained(error, repo, revision, store, command) from error
    except ValueError as error:  # an id or revision that huggingface_hub does not accept, a file too large for HTTP
        raise CheckpointError(f"the Hub does not serve this: {error}", reference, f"run: {command}") from error


class Repo:
    """A repo at one commit, as selection.py sees a folder. Making one asks the Hub for its list of files."""

    def __init__(self, repo: str, revision: str, store: Path, below: str = "") -> None:
        """Raises CheckpointError when the list holds a name that could be written outside the cache."""
        from huggingface_hub import HfApi

        self.repo, self.store, self.below = repo, store, below
        if leaves_folder(revision):
            raise CheckpointError("this is no revision", revision, "give a branch, tag or commit")
        # What the cache already holds of this revision decides the commit, so that all its files belong together.
        known = store / "refs" / (revision or "main")
        wanted = known.read_text(encoding="utf-8").strip() if known.is_file() else revision or None
        info = HfApi().model_info(repo, revision=wanted, files_metadata=True)
        self.commit = info.sha or ""
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

    def download(self, names: Sequence[str]) -> None:
        """Fetch files by name below `below`, in this order; those at hand are skipped."""
        full = list(dict.fromkeys(f"{self.below}/{name}" if self.below else name for name in names))
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
        step = host.progress(sum(sizes.values()))
        if self.ref is not None and not self.ref.is_file():  # first, so that a load that goes on takes the same commit
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.ref, self.commit)
        for name in absent:
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
                target = _Hashed(raw, partial, file, step)
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


class _Hashed:
    """The file that huggingface_hub writes a download into: hashes it, moves the progress bar, hears Cancel."""

    def __init__(self, raw: BinaryIO, path: Path, file: RemoteFile, step: Callable[[int], None]) -> None:
        self._raw, self._path, self._file, self._step = raw, path, file, step
        if raw.tell() > file.size:
            raw.truncate(0)
        self._restart()

    def _restart(self) -> None:
        """Begin with the hash of what is on disk already."""
        self._raw.flush()
        self._hash = self._file.hasher()
        with open(self._path, "rb") as earlier:
            while block := earlier.read(1 << 22):
                self._hash.update(block)
                self._step(len(block))

    def write(self, data: bytes) -> int:
        self._step(len(data))  # raises when the user has cancelled
        self._hash.update(data)
        return self._raw.write(data)

    def tell(self) -> int:
        self._raw.seek(0, os.SEEK_END)
        return self._raw.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        return self._raw.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """A server that ignored the range sends the file from its start."""
        size = self._raw.truncate(size)
        self._restart()
        return size

    def digest(self) -> str:
        return self._hash.hexdigest()


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
def _locked(path: Path) -> Iterator[None]:
    """One download of a repo at a time on this machine; waiting can be cancelled."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    step = host.progress(0)
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


def _explained(error: Exception, repo: str, revision: str, store: Path, command: str) -> CheckpointError:
    """What went wrong between here and the Hub, in the user's words. Gated comes first: it is a kind of not found."""
    from huggingface_hub import constants, errors

    at = f"{repo} at {constants.ENDPOINT}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError("download_missing is on, but HF_HUB_OFFLINE forbids downloads", at,
                               f"unset HF_HUB_OFFLINE, or on another machine run: {command}")
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo} is gated: its licence must be accepted once", f"https://huggingface.co/{repo}",
                               "accept it there, log in (hf auth login, or set HF_TOKEN), then try again or run: "
                               f"{command}")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {revision or 'main'} (any more)", at,
                               f"correct or clear the revision, or run: {command}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(f"there is no repo {repo}, or it is private", at,
                               f"correct the id, or log in (hf auth login, or set HF_TOKEN) and run: {command}")
    if isinstance(error, errors.HfHubHTTPError):
        return CheckpointError(f"the Hub refused: {error}", at, f"try again later, or run: {command}")
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        return CheckpointError("the disk is full", store, f"free some space, or move the cache with HF_HOME; what has "
                                                          f"arrived is kept. By hand: {command}")
    if isinstance(error, PermissionError) or isinstance(error, OSError) and error.errno == 30:  # EROFS
        return CheckpointError(f"cannot write into the Hugging Face cache: {error.strerror}", store,
                               f"correct its rights, or move it with HF_HOME. By hand: {command}")
    return CheckpointError(f"the download broke off ({type(error).__name__}: {error})", at,
                           f"check the network and try again, it goes on where it stopped; or run: {command}")

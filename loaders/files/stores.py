"""Where downloads land: a hub's own cache, or a folder of ComfyUI's models. A file shows there only when it is whole.

They are laid out as the hubs' own clients lay them out (huggingface_hub's guide "Understand caching": blobs, snapshots,
refs; what its `local_dir` keeps in .cache/huggingface; docs/sources/modelscope.md, "The cache"), so that every other
tool finds the files, and downloads none of them again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Protocol

from ...host.texts import Text
from ..errors import CheckpointError
from ..words import first_ten
from .hub_file import RemoteFile
from .selection import INDEX, PIPELINE, TEXT_SUFFIXES, WEIGHTS

READ = (*WEIGHTS, *TEXT_SUFFIXES)  # the kinds of files that are downloaded


class Store(Protocol):
    """A place for one repo. `lock` keeps other processes of ours out; `title` and `elsewhere` are words for errors."""

    lock: Path
    title: str
    elsewhere: str

    @property
    def folder(self) -> Path:
        """What is named in errors, and whose disk must have room; it need not exist."""
        ...

    def pinned(self) -> str:
        """The commit that earlier downloads to this place belong to, or empty."""
        ...

    def open(self, commit: str, files: Mapping[str, RemoteFile]) -> None:
        """Settle where the files of this commit go. Writes nothing. Raises CheckpointError for files of another one."""
        ...

    def path(self, name: str) -> Path:
        """Where a file shows once it is whole."""
        ...

    def partial(self, name: str) -> Path:
        """Where what has arrived of a file is kept until then."""
        ...

    def begin(self, step: Callable[[int], None]) -> None:
        """Remember the commit, before the first file. `step(0)` raises when the user has cancelled. Raises
        CheckpointError where files of another commit turn out to be there."""
        ...

    def has(self, name: str) -> bool:
        """Whether the bytes of a file are here, whole and checked, and only not shown."""
        ...

    def show(self, name: str) -> None:
        """Let a whole, checked file be seen."""
        ...


class HubCache:
    """The Hugging Face cache: blobs by digest, snapshots of links, refs."""

    title: str = Text("the Hugging Face cache")
    elsewhere: str = Text("move the cache with HF_HOME")

    def __init__(self, repo: str, revision: str) -> None:
        from huggingface_hub import constants

        name = "--".join(("models", *repo.split("/")))
        self.folder = Path(constants.HF_HUB_CACHE, name)
        self.lock = Path(constants.HF_HUB_CACHE, ".locks", name, "quantized_transformers.lock")
        self._ref = self.folder / "refs" / (revision or "main")
        self._revision, self._commit = revision, ""
        self._files: Mapping[str, RemoteFile] = {}

    def pinned(self) -> str:
        """What the cache already holds of this revision decides the commit, so that all its files belong together."""
        return self._ref.read_text(encoding="utf-8").strip() if self._ref.is_file() else ""

    def open(self, commit: str, files: Mapping[str, RemoteFile]) -> None:
        self._commit, self._files = commit, files

    def path(self, name: str) -> Path:
        return self.folder / "snapshots" / self._commit / name

    def partial(self, name: str) -> Path:
        return self.folder / "blobs" / f"{self._files[name].digest}.incomplete"

    def begin(self, step: Callable[[int], None]) -> None:
        if self._revision != self._commit and not self._ref.is_file():
            _write_atomically(self._ref, self._commit)

    def has(self, name: str) -> bool:
        return self.partial(name).with_suffix("").is_file()

    def show(self, name: str) -> None:
        blob, pointer = self.partial(name).with_suffix(""), self.path(name)
        if not blob.is_file():
            os.replace(self.partial(name), blob)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if pointer.is_symlink():  # left behind by a cache whose blob was deleted
            pointer.unlink()
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # links are not allowed: the file itself
            os.replace(blob, pointer)


class ModelScopeCache:
    """ModelScope's cache: plain files in a folder that is called as the revision is.

    Nothing there says which commit they are of, so a note of ours does. Other tools fetch into the same folder: what is
    newer than the note is theirs, and proven to be of the commit before anything is added to it.
    """

    title: str = Text("ModelScope's cache")
    elsewhere: str = Text("move the cache with MODELSCOPE_CACHE")

    def __init__(self, root: Path, repo: str, revision: str) -> None:
        name = repo.replace("/", "--")
        self.folder = root / "models" / name
        self.lock = root / ".lock" / f"quantized_transformers-{name}.lock"
        self._snapshot = self.folder / "snapshots" / revision
        self._note = self.folder / "quantized_transformers" / f"{revision}.commit"
        self._commit = ""
        self._files: Mapping[str, RemoteFile] = {}

    def pinned(self) -> str:
        return self._note.read_text(encoding="utf-8").strip() if self._note.is_file() else ""

    def open(self, commit: str, files: Mapping[str, RemoteFile]) -> None:
        self._commit, self._files = commit, files
        _refuse_others(self._snapshot, [name for name in self._there()
                                        if self.path(name).stat().st_size != files[name].size])

    def path(self, name: str) -> Path:
        return self._snapshot / name

    def partial(self, name: str) -> Path:
        return self._note.with_name(f"{self._files[name].digest}.incomplete")

    def begin(self, step: Callable[[int], None]) -> None:
        known = self._note.stat().st_mtime_ns if self._note.is_file() else 0
        _refuse_others(self._snapshot, [name for name in self._there() if self.path(name).stat().st_mtime_ns > known
                                        and not self._files[name].is_at(self.path(name), lambda _: step(0))])
        _write_atomically(self._note, self._commit)

    def has(self, name: str) -> bool:
        return False

    def show(self, name: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.partial(name), self.path(name))
        self._note.touch()

    def _there(self) -> list[str]:
        return [name for name in self._files if name.endswith(READ) and self.path(name).is_file()]


class ModelFolder:
    """A folder owner/name below one of ComfyUI's model folders: in `components` for a repo with a config.json or a
    pipeline, in `singles` for one of single files, where ComfyUI's own loaders list them."""

    title: str = Text("the model folder")
    elsewhere: str = Text("choose another folder")

    def __init__(self, repo: str, components: str, singles: str, key: str = "huggingface") -> None:
        from huggingface_hub import constants

        self._places = {root: Path(root, *repo.split("/")) for root in (components, singles)}
        self._components, self._singles, self._key = components, singles, key
        self.folder = next((path for path in self._places.values() if path.is_dir()), self._places[components])
        self.lock = Path(constants.HF_HUB_CACHE, ".locks", f"models--{repo.replace('/', '--')}",
                         "quantized_transformers.lock")
        self._commit = ""
        self._files: Mapping[str, RemoteFile] = {}

    @property
    def _notes(self) -> Path:
        return self.folder / ".cache" / self._key / "download"

    def pinned(self) -> str:
        note = next(iter(sorted(self._notes.rglob("*.metadata"))), None)
        return note.read_text(encoding="utf-8").partition("\n")[0] if note else ""

    def open(self, commit: str, files: Mapping[str, RemoteFile]) -> None:
        self._commit, self._files = commit, files
        if not self.folder.is_dir():
            described = any(name.endswith((INDEX, "config.json", PIPELINE)) for name in files)
            self.folder = self._places[self._components if described else self._singles]
        _refuse_others(self.folder, [name for name, file in files.items() if (self.folder / name).is_file()
                                     and name.endswith(READ) and self._is_other(name, file)])

    def _is_other(self, name: str, file: RemoteFile) -> bool:
        """By its size, or by what a note of any hub says of its bytes."""
        notes = (note.read_text(encoding="utf-8").split("\n")[1:2]
                 for note in self.folder.glob(f".cache/*/download/{escape(name)}.metadata"))
        return (self.folder / name).stat().st_size != file.size or any(
            len(digest) == len(file.digest) and digest != file.digest for found in notes for digest in found)

    def path(self, name: str) -> Path:
        return self.folder / name

    def partial(self, name: str) -> Path:
        kept = self._notes / f"{name}.{self._files[name].digest}.incomplete"
        return kept if len(os.fsencode(kept.name)) < 256 else kept.with_name(f"{self._files[name].digest}.incomplete")

    def begin(self, step: Callable[[int], None]) -> None:
        self._notes.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        return False

    def show(self, name: str) -> None:
        """The note beside it is what `hf download --local-dir` writes: it downloads the file no second time. It comes
        first, for where this ends between the two a note without its file is written again."""
        note = self._notes / f"{name}.metadata"
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(note, f"{self._commit}\n{self._files[name].digest}\n{time.time()}\n")
        os.replace(self.partial(name), self.path(name))


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    if names:
        raise CheckpointError(Text("this folder holds another version of {names}", names=first_ten(names)), folder,
                              Text("move it away or delete it, or download to another place"))


def _write_atomically(path: Path, text: str) -> None:
    """Under the store's lock: what a run that was killed here has left has the same name, and is written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

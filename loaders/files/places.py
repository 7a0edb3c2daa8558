"""Where the bytes are: a reference (repo id, folder or file) becomes a list of local files.

Nothing here opens a weight file. The order for a reference that is no existing path: ComfyUI's model folders, the
Hugging Face cache, and, only when asked for, a download into that cache (hub.py). A place that lacks a file of this
load is passed over for the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ... import host
from ..errors import CheckpointError, MissingFiles
from ..words import first_ten
from .selection import WEIGHTS, Folder, Selection
from .source import Source, read_json
from .unfinished import refuse_unfinished

_DEPTH = 4  # how far below a folder its files are looked for


class LocalFolder:
    """A folder on disk, as selection.py sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def place(self) -> str:
        return str(self.path)

    def names(self, below: str = "") -> list[str]:
        top = self.path / below if below else self.path
        found: list[str] = []
        for folder, folders, files in os.walk(top, followlinks=True):
            relative = Path(folder).relative_to(top)
            found += [(relative / file).as_posix() for file in files if (Path(folder) / file).is_file()]
            folders[:] = [name for name in folders if len(relative.parts) < _DEPTH and not name.startswith(".")]
        return found

    def read_json(self, name: str) -> dict[str, Any]:
        return read_json(str(self.path / name))

    def source(self, reference: str, selection: Selection) -> Source:
        """The selected names as paths."""
        def path(name: str | None) -> str | None:
            return str(self.path / name) if name else None

        for name in {*selection.files, *filter(None, (selection.folder, selection.config))}:
            refuse_unfinished(self.path / name)
        return Source(reference, str(self.path / selection.folder), tuple(str(self.path / n) for n in selection.files),
                      path(selection.config), path(selection.index_file), selection.choice,
                      texts=tuple(str(self.path / n) for n in selection.texts))


def cleaned(text: str | None) -> str:
    """What was typed or pasted, without the blanks and the one pair of quotes around it that shells and the Explorer
    of Windows ("Copy as path") put there; the address of a page of the Hub as the repo id, with what is named in it."""
    text = (text or "").strip()
    text = text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    page = _page(text)
    return text if page is None or page[1] not in ("", "main") else page[0]


def _page(text: str) -> tuple[str, str] | None:
    """(repo id and what is below it, revision or empty) of the address of a model's page on the Hub, or on the mirror
    that HF_ENDPOINT names; None for any other text."""
    if not text.startswith(("https://", "http://")):
        return None
    from urllib.parse import unquote, urlsplit

    url, mirror = urlsplit(text), urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if url.netloc not in ("huggingface.co", "www.huggingface.co", "hf.co", mirror.netloc) or len(parts) < 2 \
            or parts[0] in ("datasets", "spaces", "docs", "blog", "collections", "papers"):
        return None
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "raw"):
        return "/".join([*parts[:2], *parts[4:]]), parts[3]
    return "/".join(parts[:2]), ""


def is_repo(reference: str) -> bool:
    """Whether a reference that is no path on disk can be a repo id (owner/name, with a subfolder or file behind it)."""
    text = cleaned(reference)
    owner, _, name = text.partition("/")
    return bool(owner and name) and not (set("\\: \"'") & set(text) or text.startswith((".", "~"))
                                         or name.endswith(WEIGHTS) and "/" not in name)


def candidates(reference: str, revision: str = "") -> Iterator[Path]:
    """Every place on this machine that `reference` can mean, in the order of preference. Backslashes are taken as they
    are written first, then as the separators that they are on Windows, where many workflows are made.

    Raises CheckpointError for an empty reference, an absolute path that does not exist, and one that contains '..'.
    """
    text = cleaned(reference)
    if not text:
        raise CheckpointError("no checkpoint is chosen", do="pick one in the list, or give a path or repo id")
    slashed = text.replace("\\", "/")
    spellings = tuple(dict.fromkeys((text, slashed)))
    for spelling in spellings:
        direct = Path(spelling).expanduser()
        if direct.exists():
            yield direct
            return
    if direct.is_absolute() or text.startswith((".", "~")):
        raise CheckpointError("there is no such file or folder", Path(text).expanduser(), "correct the path")
    parts = PurePosixPath(slashed).parts
    if ".." in parts:
        raise CheckpointError("a reference must not contain '..'", text, "give the full path, or a repo id")
    below = PurePosixPath(*parts[2:])
    repo = ("--".join(parts[:2]) / below, parts[1] / below) if len(parts) > 1 else ()
    for root in (*host.model_folders(), *host.text_folders()):
        for name in (*spellings, *repo):
            found = Path(root, name)
            if found.exists():
                yield found
    if is_repo(text):
        snapshot = host.cached_snapshot("/".join(parts[:2]), revision)
        if snapshot and Path(snapshot, *parts[2:]).exists():
            yield Path(snapshot, *parts[2:])


def find_path(reference: str, revision: str = "") -> Path:
    """The first local file or folder that `reference` names. Raises CheckpointError when there is none."""
    found = next(candidates(reference, revision), None)
    if found is None:
        raise _not_here(cleaned(reference), revision, ())
    refuse_unfinished(found)
    return found


T = TypeVar("T")
# fetch(reference, revision, select, command) -> the folder; hub.fetch, or one that asks or reports in between
Fetch = Callable[[str, str, Callable[[Folder], Sequence[Selection]], str], Path]


def resolve(reference: str, revision: str, use: Callable[[Path], T],
            select: Callable[[Folder], Sequence[Selection]], patterns: Sequence[str],
            download: bool | Fetch) -> T:
    """`use(path)` on the first place that has all files of this load; the others raise MissingFiles from it.

    With `download`, a repo that no place has completely is fetched: the files that `select` chooses from it, at one
    commit. `patterns` are the globs of the files in question, for the command in the message. Raises CheckpointError.
    """
    short: MissingFiles | None = None
    for path in candidates(reference, revision):
        refuse_unfinished(path)
        try:
            return use(path)
        except MissingFiles as error:
            short = short or error
    text = cleaned(reference)
    if not is_repo(text) or Path(text).expanduser().exists():
        raise short or _not_here(text, revision, patterns)
    command = download_command(text, revision, patterns)
    if download:
        from . import hub

        fetch = hub.fetch if download is True else download
        return use(fetch(text, revision, select, command))
    if short is not None:
        raise MissingFiles(short.what, short.where, f"switch download_missing on, or run: {command}") from short
    raise _not_here(text, revision, patterns)


def download_command(reference: str, revision: str, patterns: Sequence[str]) -> str:
    """The `hf download` line that fetches the files of a load into the Hugging Face cache."""
    parts = PurePosixPath(reference).parts
    below = "/".join(parts[2:])
    includes = [f"{below}/{pattern}" if below else pattern for pattern in patterns]
    if below.endswith((*WEIGHTS, ".json")):
        includes = [below]
    return " ".join(["hf download", "/".join(parts[:2]), *([f"--revision {revision}"] if revision else []),
                     *(f'--include "{pattern}"' for pattern in includes)])


def _not_here(text: str, revision: str, patterns: Sequence[str]) -> MissingFiles:
    page = _page(text)
    if page is not None:
        return MissingFiles(f"this address is of the revision {page[1]!r}", text,
                            f"give {page[0]}, and {page[1]} as revision")
    if is_repo(text):
        return MissingFiles(f"{text} is not on this machine", "",
                            f"switch download_missing on, or run: {download_command(text, revision, patterns)}")
    return MissingFiles(f"{text} was found neither as a path nor in ComfyUI's model folders", "",
                        f"looked in {first_ten(host.model_folders())}; give a full path, or a repo id owner/name")

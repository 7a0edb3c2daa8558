"""Where the bytes are: a reference (repo id, folder or file) becomes a list of local files.

Nothing here opens a weight file. The order for a reference that is no existing path: ComfyUI's model folders, the
caches of the hubs (hubs/), and, only when asked for, a download into one of them (hub.py). A place that lacks a file of
this load is passed over for the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ... import host
from ...host.texts import Text
from ..errors import CheckpointError, MissingFiles
from ..words import first_ten
from . import hubs
from .addresses import address_of
from .selection import WEIGHTS, Folder, Selection, not_of_files
from .source import Source, read_json
from .unfinished import refuse_unfinished

_DEPTH = 4  # how far below a folder its files are looked for
_MOST = 20_000  # of files and folders in it; a repo of many models has 1000


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
        left = _MOST
        for folder, folders, files in os.walk(top, followlinks=True):
            relative = Path(folder).relative_to(top)
            left -= len(files) + len(folders)
            if left < 0:
                raise CheckpointError(Text("there are more than {most:,} files and folders in this folder", most=_MOST),
                                      top, Text("give the folder of the checkpoint itself"))
            found += [(relative / file).as_posix() for file in files if os.path.isfile(os.path.join(folder, file))]
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
    of Windows ("Copy as path") put there; the address of a page of a hub as the reference to what is named in it."""
    text = (text or "").strip()
    text = text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    page = _page(text)
    return page[0] if page and page[1] in ("", page[2]) else text


def _page(text: str) -> tuple[str, str, str] | None:
    """(reference, revision or empty, main branch) of the address of a model's page on a hub; None for other texts."""
    if not text.startswith(("https://", "http://")):
        return None
    from urllib.parse import urlsplit

    try:
        url = urlsplit(text)
    except ValueError:  # "http://[": no address of anything
        return None
    return next(((*found, hub.MAIN) for hub in hubs.named() if (found := hub.address(url))), None)


def is_repo(reference: str) -> bool:
    """Whether a reference that is no path on disk can be a repo id (owner/name, with a subfolder or file behind it, and
    its hub in front of it)."""
    _, text = hubs.split(cleaned(reference))
    owner, _, name = text.partition("/")
    return bool(owner and name) and not (set("\\: \"'") & set(text) or text.startswith((".", "~"))
                                         or name.endswith(WEIGHTS) and "/" not in name)


def downloadable(reference: str) -> str:
    """The repo id, with what is below it, that a reference which is no path on disk is fetched by: the reference
    itself, or where a file of its name is published. Empty for any other."""
    text = cleaned(reference)
    return text if is_repo(text) else address_of(text)


def candidates(reference: str, revision: str = "") -> Iterator[Path]:
    """Every place on this machine that `reference` can mean, in the order of preference. Backslashes are taken as they
    are written first, then as the separators that they are on Windows, where many workflows are made.

    Raises CheckpointError for an empty reference, an absolute path that does not exist, one that contains '..', and a
    hub without a repo.
    """
    key, text = hubs.split(cleaned(reference))
    if key and not is_repo(reference):
        raise CheckpointError(Text("this names a hub, and no repo on it"), repr(text[:200]),
                              Text("give {key}:owner/name", key=key))
    if not text:
        raise CheckpointError(Text("no checkpoint is chosen"),
                              do=Text("pick one in the list, or give a path or repo id"))
    slashed = text.replace("\\", "/")
    if not_of_files(slashed):
        raise CheckpointError(Text("this is no reference: it is too long, or no name of files"), repr(text[:80]),
                              Text("give a name of the list, a path, or a repo id owner/name"))
    spellings = tuple(dict.fromkeys((text, slashed)))
    for spelling in spellings if not key else ():
        direct = Path(spelling).expanduser()
        if direct.exists():
            yield direct
            return
    if Path(slashed).expanduser().is_absolute() or text.startswith((".", "~")):
        raise CheckpointError(Text("there is no such file or folder"), Path(text).expanduser(),
                              Text("correct the path"))
    parts = PurePosixPath(slashed).parts
    if ".." in parts:
        raise CheckpointError(Text("a reference must not contain '..'"), text, Text("give the full path, or a repo id"))
    below = PurePosixPath(*parts[2:])
    repo = ("--".join(parts[:2]) / below, parts[1] / below) if len(parts) > 1 else ()
    # a file of a published name, as ComfyUI's own dialog and most people put it there
    alone = (below.name,) if below.name and address_of(below.name) == "/".join(parts) else ()
    for root in (*host.model_folders(), *host.text_folders()):
        for name in (*spellings, *repo, *alone):
            found = Path(root, name)
            if found.exists():
                yield found
    if is_repo(text):
        for hub in hubs.named(key):
            for snapshot in hub.cached("/".join(parts[:2]), revision):
                if Path(snapshot, *parts[2:]).exists():
                    yield Path(snapshot, *parts[2:])
    elif address_of(text):
        yield from candidates(address_of(text), revision)


def find_path(reference: str, revision: str = "") -> Path:
    """The first local file or folder that `reference` names. Raises CheckpointError when there is none."""
    found = next(candidates(reference, revision), None)
    if found is None:
        raise _not_here(cleaned(reference), revision, ())
    refuse_unfinished(found)
    return found


T = TypeVar("T")
# fetch(reference, revision, select, patterns) -> the folder; hub.fetch, or one that asks or reports in between
Fetch = Callable[[str, str, Callable[[Folder], Sequence[Selection]], Sequence[str]], Path]


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
    text = downloadable(reference)
    if not text or Path(cleaned(reference)).expanduser().exists():
        raise short or _not_here(cleaned(reference), revision, patterns)
    if download:
        from . import hub

        fetch = hub.fetch if download is True else download
        return use(fetch(text, revision, select, patterns))
    if short is not None:
        command = hubs.command(text, revision, patterns)
        raise MissingFiles(short.what, short.where,
                           Text("switch download_missing on, or run: {command}", command=command)) from short
    raise _not_here(cleaned(reference), revision, patterns)


def _not_here(text: str, revision: str, patterns: Sequence[str]) -> MissingFiles:
    page = _page(text)
    if page is not None:
        return MissingFiles(Text("this address is of the revision {revision!r}", revision=page[1]), text,
                            Text("give {repo}, and {revision} as revision", repo=page[0], revision=page[1]))
    repo = downloadable(text)
    if repo:
        return MissingFiles(Text("{reference} is not on this machine", reference=text),
                            "" if repo == text else Text("it is published as {repo}", repo=repo),
                            Text("switch download_missing on, or run: {command}",
                                 command=hubs.command(repo, revision, patterns)))
    return MissingFiles(Text("{reference} was found neither as a path nor in ComfyUI's model folders",
                             reference=text), "",
                        Text("looked in {folders}; give a full path, or a repo id owner/name",
                             folders=first_ten(host.model_folders())))

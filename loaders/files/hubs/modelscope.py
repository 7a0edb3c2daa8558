"""ModelScope (modelscope.cn, modelscope.ai), spoken to over HTTP.

Its client has no public call that could do this (docs/sources/modelscope.md, "The client"): progress callbacks that
raise are taken for a failure of the network and tried again, so nothing hears Cancel; it remembers no commit, so that
what a branch pointed to at different times comes to lie in one folder. Nor would it come with this pack. Python's own
HTTP is used, since huggingface_hub's is another one in each of the versions that are supported.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote

from ....host.texts import Text
from ...errors import CheckpointError
from ...words import first_ten
from ..hub_file import HashedFile, RemoteFile
from ..selection import leaves_folder
from ..stores import ModelScopeCache, Store
from . import modelscope_http as http
from .base import Listing

KEY, TITLE, MAIN = "modelscope", "ModelScope", "master"
_PAGES = re.compile(r"(www\.)?modelscope\.(cn|ai)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = 7  # digits of a commit that are taken for it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED = 3000  # the list of a repo's files ends there without a word
_TRIES = 5  # in a row that bring nothing


def address(url: SplitResult) -> tuple[str, str] | None:
    """Of a model's page, or of one of its files: /models/owner/name, /file/view/master/x, /resolve/master/x ..."""
    parts = [unquote(part) for part in url.path.split("/") if part]
    if not _PAGES.fullmatch(url.netloc) or len(parts) < 3 or parts[0] != "models":
        return None
    _, owner, name, *below = parts
    if below[:2] == ["file", "view"]:
        below = below[1:] + parse_qs(url.query).get("fileName", [])[:1]
    if len(below) > 1 and below[0] in ("view", "resolve", "tree"):
        return f"{KEY}:{'/'.join([owner, name, *below[2:]])}", below[1]
    return f"{KEY}:{owner}/{name}", ""


def page(repo: str) -> str:
    return f"{http.sites()[0]}/models/{repo}"


def command(repo: str, revision: str, includes: Sequence[str]) -> str:
    return " ".join(["modelscope download --model", repo, *([f"--revision {revision}"] if revision else []),
                     *(["--include", *(f'"{pattern}"' for pattern in includes)] if includes else [])])


def root() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def cached(repo: str, revision: str) -> list[Path]:
    """Where its client keeps a repo, and where it did before 1.38: dots in names as ___, one revision only."""
    if leaves_folder(revision):
        return []
    owner, _, name = repo.partition("/")
    found = [root() / "models" / f"{owner}--{name}" / "snapshots" / (revision or MAIN)]
    if not revision:
        found += [root() / above / owner / spelled for above in ("models", "hub/models", "", "hub")
                  for spelled in dict.fromkeys((name.replace(".", "___"), name))]
    return [folder for folder in found if os.path.isdir(folder)]


def cache(repo: str, revision: str) -> Store:
    return ModelScopeCache(root(), repo, revision or MAIN)


def failures() -> tuple[type[Exception], ...]:
    return OSError, *http.BROKEN


def listing(repo: str, revision: str | None) -> Listing:
    asked = revision or MAIN
    data = http.data(f"{repo}/repo/files", {"Revision": asked, "Recursive": "True"})
    every = data.get("Files") or []
    if len(every) >= _LISTED:
        raise CheckpointError(Text("ModelScope lists no more than {most} files of a repo, and this one may have more",
                                   most=_LISTED), repo,
                              Text("download it by hand: {command}", command=command(repo, revision or "", ())))
    items = [item for item in every if item.get("Type") == "blob"]
    files = {str(item.get("Path") or "/"): RemoteFile(int(item.get("Size") or 0), str(item.get("Sha256") or "").lower())
             for item in items}
    unsafe = [name for name, file in files.items() if leaves_folder(name) or not _SHA256.fullmatch(file.digest)]
    if unsafe:
        raise CheckpointError(Text("ModelScope lists files with unsafe names or hashes: {files}",
                                   files=first_ten(map(repr, unsafe))), repo,
                              Text("do not use this repo; nothing of it was written"))
    commit = asked if _COMMIT.fullmatch(asked) else _newest(repo, asked, data.get("LatestCommitter") or {}, items)
    if not _COMMIT.fullmatch(commit):
        raise CheckpointError(Text("ModelScope names no commit for {repo}", repo=repo), commit, Text("try again later"))
    return Listing(commit, files, False)


def _newest(repo: str, branch: str, last: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> str:
    """The commit that a branch points to; its first digits where it cannot be found in full.

    The list of files has those digits, and of each file the last commit in full. Where none begins with them (the
    newest commit took files away), the list of commits must agree with them: it is not documented.
    """
    if _COMMIT.fullmatch(last.get("Id") or ""):
        return str(last["Id"])
    short = str(last.get("ShortId") or "")
    if len(short) < _SHORT:
        return short
    commits = {str(item.get("Revision")) for item in items}
    if not any(commit.startswith(short) for commit in commits):
        found = http.data(f"{repo}/commits", {"Ref": branch, "PageSize": "1"}).get("Commit") or []
        commits = {str(commit.get("Id")) for commit in found[:1]}
    return next((commit for commit in sorted(commits) if commit.startswith(short)), short)


def transfer(repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
    tries = _TRIES
    while (start := target.tell()) < file.size:
        problem: Exception = ConnectionError(Text("it ended after {arrived:,} of {all:,} bytes of {name}",
                                                  arrived=start, all=file.size, name=name))
        try:
            with http.ask(f"{repo}/repo", {"Revision": commit, "FilePath": name}, start) as answer:
                if not http.continues(answer, start):
                    target.truncate(0)
                for block in http.blocks(answer, file.size - target.tell()):
                    target.write(block)
        except http.BROKEN as error:
            problem = error
        except http.RefusedError as error:
            if not error.busy:
                raise
            problem = error
        tries = _TRIES if target.tell() > start else tries - 1
        if not tries:
            raise problem
        if target.tell() < file.size:
            time.sleep(1)


def refuses_licence(error: Exception) -> bool:
    return isinstance(error, http.RefusedError) and error.no_access


def gated(repo: str, command: str) -> CheckpointError:
    return CheckpointError(Text("ModelScope gives no access to {repo}: it is private, or must be applied for once",
                                repo=repo), page(repo),
                           Text("apply there, set MODELSCOPE_API_TOKEN, then try again or run: {command}",
                                command=command))


def explained(error: Exception, repo: str, revision: str, store: Store, command: str) -> CheckpointError:
    at = Text("{repo} at {site}", repo=repo, site=", ".join(http.sites()))
    if isinstance(error, http.OfflineError):
        return CheckpointError(Text("download_missing is on, but HF_HUB_OFFLINE forbids downloads"), at,
                               Text("unset HF_HUB_OFFLINE, or on another machine run: {command}", command=command))
    if not isinstance(error, http.RefusedError):
        return CheckpointError(Text("the download broke off ({kind}: {error})", kind=type(error).__name__, error=error),
                               at,
                               Text("check the network and try again, it goes on where it stopped; or run: {command}",
                                    command=command))
    if error.no_access:
        return gated(repo, command)
    if error.no_revision:
        return CheckpointError(Text("{repo} has no revision {revision} (any more)", repo=repo,
                                    revision=revision or MAIN), at,
                               Text("correct or clear the revision, or run: {command}", command=command))
    if error.no_repo:
        return CheckpointError(Text("there is no repo {repo}, or it is private", repo=repo), at,
                               Text("correct the id, or set MODELSCOPE_API_TOKEN and run: {command}", command=command))
    return CheckpointError(Text("ModelScope refused: {error}", error=error), at,
                           Text("try again later, or run: {command}", command=command))

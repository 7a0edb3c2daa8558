"""ModelScope (modelscope.cn, modelscope.ai), spoken to over HTTP.

Its client has no public call that could do this (docs/sources/modelscope.md, "The client"): progress callbacks that
raise are taken for a failure of the network and tried again, so nothing hears Cancel; it remembers no commit, so that
what a branch pointed to at different times comes to lie in one folder. Nor would it come with this pack. Python's own
HTTP is used, since huggingface_hub's is another one in each of the versions that are supported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote

from ....host.texts import Text
from ...errors import CheckpointError
from ..hub_file import HashedFile, RemoteFile
from ..selection import leaves_folder
from ..stores import ModelScopeCache, Store
from . import http, listed
from . import modelscope_http as api
from .base import Listing
from .transfer import transfer as bytes_of

KEY, TITLE, MAIN = "modelscope", "ModelScope", "master"
LOG_IN = Text("set MODELSCOPE_API_TOKEN")
_PAGES = re.compile(r"(www\.)?modelscope\.(cn|ai)")
_SHORT = 7  # digits of a commit that are taken for it
_LISTED = 3000  # the list of a repo's files ends there without a word


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
    return f"{api.sites()[0]}/models/{repo}"


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


def site() -> str:
    return ", ".join(api.sites())


def listing(repo: str, revision: str | None, step: http.Step) -> Listing:
    asked = revision or MAIN
    data = api.data(f"{repo}/repo/files", {"Revision": asked, "Recursive": "True"}, step)
    every = listed.objects(data.get("Files"))
    if len(every) >= _LISTED:
        raise CheckpointError(Text("ModelScope lists no more than {most} files of a repo, and this one may have more",
                                   most=_LISTED), repo,
                              Text("download it by hand: {command}", command=command(repo, revision or "", ())))
    items = [item for item in every if item.get("Type") == "blob"]
    files = listed.files(TITLE, repo, ((item.get("Path"), item.get("Size"), _digest(item)) for item in items))
    last = data.get("LatestCommitter")
    commit = asked if listed.is_commit(asked) else _newest(repo, asked, last if isinstance(last, dict) else {}, items,
                                                           step)
    if not listed.is_commit(commit):
        raise listed.no_commit(TITLE, repo, commit)
    return Listing(commit, files, False)


def _digest(item: Mapping[str, Any]) -> Any:
    """Every file has its SHA-256."""
    digest = item.get("Sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _newest(repo: str, branch: str, last: Mapping[str, Any], items: Sequence[Mapping[str, Any]],
            step: http.Step) -> str:
    """The commit that a branch points to; its first digits where it cannot be found in full.

    The list of files has those digits, and of each file the last commit in full. Where none begins with them (the
    newest commit took files away), the list of commits must agree with them: it is not documented.
    """
    if listed.is_commit(last.get("Id")):
        return str(last["Id"])
    short = str(last.get("ShortId") or "")
    if len(short) < _SHORT:
        return short
    commits = {str(item.get("Revision")) for item in items}
    if not any(commit.startswith(short) for commit in commits):
        found = listed.objects(api.data(f"{repo}/commits", {"Ref": branch, "PageSize": "1"}, step).get("Commit"))
        commits = {str(commit.get("Id")) for commit in found[:1]}
    return next((commit for commit in sorted(commits) if commit.startswith(short)), short)


def transfer(repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
    bytes_of(lambda start: api.asked(f"{repo}/repo", {"Revision": commit, "FilePath": name}, target.step, start), file,
             target)


def gated(repo: str, command: str) -> CheckpointError:
    return CheckpointError(Text("ModelScope gives no access to {repo}: it is private, or must be applied for once",
                                repo=repo), page(repo),
                           Text("apply there, set MODELSCOPE_API_TOKEN, then try again or run: {command}",
                                command=command))

"""The Hugging Face Hub: huggingface_hub does the talking (endpoint, token, offline switch, redirects, retries)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from ....host.texts import Text
from ...errors import CheckpointError
from ...words import first_ten
from ..hub_file import HashedFile, RemoteFile
from ..selection import leaves_folder
from ..stores import HubCache, Store
from . import xet
from .base import Listing

KEY, TITLE, MAIN = "huggingface", "Hugging Face", "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
cache = HubCache


def address(url: SplitResult) -> tuple[str, str] | None:
    """On the Hub, or on the mirror that HF_ENDPOINT names."""
    mirror = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if url.netloc not in ("huggingface.co", "www.huggingface.co", "hf.co", mirror.netloc) or len(parts) < 2 \
            or parts[0] in ("datasets", "spaces", "docs", "blog", "collections", "papers"):
        return None
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "raw"):
        return "/".join([*parts[:2], *parts[4:]]), parts[3]
    return "/".join(parts[:2]), ""


def page(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


def command(repo: str, revision: str, includes: Sequence[str]) -> str:
    return " ".join(["hf download", repo, *([f"--revision {revision}"] if revision else []),
                     *(f'--include "{pattern}"' for pattern in includes)])


def root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached(repo: str, revision: str) -> list[Path]:
    try:
        from huggingface_hub import snapshot_download

        return [Path(snapshot_download(repo, revision=revision or None, local_files_only=True))]
    except (ImportError, OSError, ValueError) as error:  # no huggingface_hub, not cached, an invalid id: "not here",
        found = getattr(error, "snapshot_path", None)  # or some files of the repo are (IncompleteSnapshotError)
        return [Path(found)] if found else []


def failures() -> tuple[type[Exception], ...]:
    """The base class of its HTTP errors is that of the HTTP library it uses, which differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *HfHubHTTPError.__bases__


def listing(repo: str, revision: str | None) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise CheckpointError(Text("the Hub names no commit for {repo}", repo=repo), commit, Text("try again later"))
    files, unsafe = {}, []
    for item in info.siblings or []:
        digest = (item.lfs.sha256 if item.lfs else item.blob_id) or ""
        if leaves_folder(item.rfilename) or not (_COMMIT.fullmatch(digest) or _SHA256.fullmatch(digest)):
            unsafe.append(item.rfilename)
        files[item.rfilename] = RemoteFile(item.size or 0, digest)
    if unsafe:
        raise CheckpointError(Text("the Hub lists files with unsafe names or hashes: {files}",
                                   files=first_ten(map(repr, unsafe))), repo,
                              Text("do not use this repo; nothing of it was written"))
    return Listing(commit, files, bool(info.gated))


def transfer(repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
    """Its own downloads start over after an interruption; this goes on. A file that begins is asked of Xet first."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(repo, name, revision=commit), build_hf_headers()
    if not target.tell():
        xet.transfer(url, headers, file, target)
    if (come := target.tell()) < file.size:
        http_get(url, target, resume_size=come, expected_size=file.size,  # type: ignore[arg-type]
                 displayed_filename=name, headers=headers)


def refuses_licence(error: Exception) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(error, GatedRepoError)


def gated(repo: str, command: str) -> CheckpointError:
    return CheckpointError(Text("{repo} is gated: its licence must be accepted once", repo=repo), page(repo),
                           Text("accept it there, log in (hf auth login, or set HF_TOKEN), then try again or run: "
                                "{command}", command=command))


def explained(error: Exception, repo: str, revision: str, store: Store, command: str) -> CheckpointError:
    """Gated comes first: it is a kind of not found."""
    from huggingface_hub import constants, errors

    at = Text("{repo} at {site}", repo=repo, site=constants.ENDPOINT)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(Text("download_missing is on, but HF_HUB_OFFLINE forbids downloads"), at,
                               Text("unset HF_HUB_OFFLINE, or on another machine run: {command}", command=command))
    if isinstance(error, errors.GatedRepoError):
        return gated(repo, command)
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(Text("{repo} has no revision {revision} (any more)", repo=repo,
                                    revision=revision or MAIN), at,
                               Text("correct or clear the revision, or run: {command}", command=command))
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(Text("there is no repo {repo}, or it is private", repo=repo), at,
                               Text("correct the id, or log in (hf auth login, or set HF_TOKEN) and run: {command}",
                                    command=command))
    if isinstance(error, errors.HfHubHTTPError):
        return CheckpointError(Text("the Hub refused: {error}", error=error), at,
                               Text("try again later, or run: {command}", command=command))
    return CheckpointError(Text("the download broke off ({kind}: {error})", kind=type(error).__name__, error=error), at,
                           Text("check the network and try again, it goes on where it stopped; or run: {command}",
                                command=command))

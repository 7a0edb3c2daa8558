"""The Hugging Face Hub: its address, token, offline switch and cache are those of huggingface_hub, and so is what its
answers mean (huggingface_hub's hf_raise_for_status and HfApi.model_info)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ....host.texts import Text
from ...errors import CheckpointError
from ..hub_file import HashedFile, RemoteFile
from ..stores import HubCache
from . import http, listed, xet
from .base import Listing
from .transfer import transfer as bytes_of

KEY, TITLE, MAIN = "huggingface", "Hugging Face", "main"
LOG_IN = Text("log in (hf auth login, or set HF_TOKEN)")
_KINDS = {"RepoNotFound": "repo", "RevisionNotFound": "revision", "GatedRepo": "access"}
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


def site() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def listing(repo: str, revision: str | None, step: http.Step) -> Listing:
    from huggingface_hub.utils import build_hf_headers

    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    with _asked(f"{site()}/api/models/{quote(repo)}{at}?blobs=true", build_hf_headers(), step) as answer:
        info = answer.json()
    if not isinstance(info, dict):
        raise http.StrangeError(Text("it has no list of files"))
    commit = info.get("sha")
    if not listed.is_commit(commit):
        raise listed.no_commit(TITLE, repo, commit)
    items = listed.objects(info.get("siblings"))
    files = listed.files(TITLE, repo, ((item.get("rfilename"), item.get("size"), _digest(item)) for item in items))
    return Listing(commit, files, bool(info.get("gated")))


def _digest(item: Mapping[str, Any]) -> Any:
    """The SHA-256 of a large file, which is in LFS, or git's own of a small one."""
    large = item.get("lfs")
    return large.get("sha256") if isinstance(large, dict) else item.get("blobId") if large is None else None


def transfer(repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
    """A file that begins is asked of Xet first."""
    from huggingface_hub.utils import build_hf_headers

    url, headers = f"{site()}/{quote(repo)}/resolve/{commit}/{quote(name)}", build_hf_headers()
    if not target.tell():
        xet.transfer(url, headers, file, target)
    bytes_of(lambda start: _asked(url, headers, target.step, start), file, target)


@contextmanager
def _asked(url: str, headers: Mapping[str, str], step: http.Step, start: int = 0) -> Iterator[http.Answer]:
    """An answer that has what was asked for; RefusedError for any other, by the words of the Hub's headers."""
    with http.ask(url, headers, step, start) as answer:
        if answer.status not in (200, 206):
            code, said = (answer.headers.get(name) or "" for name in ("X-Error-Code", "X-Error-Message"))
            unknown = answer.status == 401 and said != "Invalid credentials in Authorization header"
            kind = _KINDS.get(code) or ("repo" if unknown else "")
            raise http.RefusedError(" ".join(f"HTTP {answer.status} {said}".split())[:200], kind,
                                    answer.status == 429 or answer.status >= 500)
        yield answer


def gated(repo: str, command: str) -> CheckpointError:
    return CheckpointError(Text("{repo} is gated: its licence must be accepted once", repo=repo), page(repo),
                           Text("accept it there, log in (hf auth login, or set HF_TOKEN), then try again or run: "
                                "{command}", command=command))

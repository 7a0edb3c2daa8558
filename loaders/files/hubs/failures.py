"""What went wrong between here and a hub, in the user's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....host.texts import Text
from ...errors import CheckpointError
from .http import OfflineError, RefusedError, StrangeError

if TYPE_CHECKING:
    from .base import Hub


def explained(hub: Hub, error: Exception, repo: str, revision: str, command: str) -> CheckpointError:
    """The error that says it, of any failure of http.py, and of a disk; `command` is the line that does it by hand."""
    at = Text("{repo} at {site}", repo=repo, site=hub.site())
    if isinstance(error, OfflineError):
        return CheckpointError(Text("download_missing is on, but HF_HUB_OFFLINE forbids downloads"), at,
                               Text("unset HF_HUB_OFFLINE, or on another machine run: {command}", command=command))
    if isinstance(error, StrangeError):
        return CheckpointError(Text("{hub} sends an answer that cannot be used: {error}", hub=hub.TITLE, error=error),
                               at, Text("try again later, or run: {command}", command=command))
    if not isinstance(error, RefusedError):
        return CheckpointError(Text("the download broke off ({error})", error=error), at,
                               Text("check the network and try again, it goes on where it stopped; or run: {command}",
                                    command=command))
    if error.kind == "access":
        return hub.gated(repo, command)
    if error.kind == "revision":
        return CheckpointError(Text("{repo} has no revision {revision} (any more)", repo=repo,
                                    revision=revision or hub.MAIN), at,
                               Text("correct or clear the revision, or run: {command}", command=command))
    if error.kind == "repo":
        return CheckpointError(Text("there is no repo {repo}, or it is private", repo=repo), at,
                               Text("correct the id, or {log_in} and run: {command}", log_in=hub.LOG_IN,
                                    command=command))
    return CheckpointError(Text("{hub} refused: {error}", hub=hub.TITLE, error=error), at,
                           Text("try again later, or run: {command}", command=command))

"""What goes wrong between here and the Hugging Face Hub, in the user's words."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def gated(repo: str, command: str) -> CheckpointError:
    """The error for a repo whose licence was not accepted."""
    return CheckpointError(f"{repo} is gated: its licence must be accepted once", f"https://huggingface.co/{repo}",
                           "accept it there, log in (hf auth login, or set HF_TOKEN), then try again or run: "
                           f"{command}")


def explained(error: Exception, repo: str, revision: str, store: Path, command: str) -> CheckpointError:
    """What went wrong between here and the Hub, in the user's words. Gated comes first: it is a kind of not found."""
    from huggingface_hub import constants, errors

    at = f"{repo} at {constants.ENDPOINT}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError("download_missing is on, but HF_HUB_OFFLINE forbids downloads", at,
                               f"unset HF_HUB_OFFLINE, or on another machine run: {command}")
    if isinstance(error, errors.GatedRepoError):
        return gated(repo, command)
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

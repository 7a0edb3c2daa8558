"""The one error a user of this pack meets (host/errors.py), its kinds, and how lists of names are shown."""

from __future__ import annotations

from collections.abc import Iterable

from ..host.errors import CheckpointError

__all__ = ["CheckpointError", "MissingFiles", "first_ten"]


class MissingFiles(CheckpointError):
    """Files of a reference are not where they were looked for; another place, or a download, may have them."""


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"

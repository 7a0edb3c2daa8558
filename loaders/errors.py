"""The one error a user of this pack meets (host/errors.py), and its kinds."""

from __future__ import annotations

from ..host.errors import CheckpointError

__all__ = ["CheckpointError", "MissingFiles"]


class MissingFiles(CheckpointError):
    """Files of a reference are not where they were looked for; another place, or a download, may have them."""

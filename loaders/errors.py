"""The one error a user of this pack meets (host/errors.py), and its kinds."""

from __future__ import annotations

from ..host.errors import CheckpointError

__all__ = ["CheckpointError", "MissingFiles", "OtherKind"]


class MissingFiles(CheckpointError):
    """Files of a reference are not where they were looked for; another place, or a download, may have them."""


class OtherKind(CheckpointError):  # noqa: N818  # as MissingFiles: what it says of the files
    """A whole file, and no transformer: a LoRA, a VAE, a text encoder, what nothing here knows."""

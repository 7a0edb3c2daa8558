"""Answers of the host in a process that has none: as the server's process gave them."""

from __future__ import annotations

import sys
from typing import Any


def act_for(folders: list[str], capability: tuple[int, int] | None) -> None:
    """From now on, in this process: these are the host's model folders, and this is the capability of its device.

    For helper processes only; ComfyUI must not be imported in them.
    """
    package: Any = sys.modules[__package__]
    package.model_folders = lambda: list(folders)
    package.capability = lambda: capability

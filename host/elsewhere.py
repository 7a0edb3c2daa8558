"""Answers of the host in a process that has none: as the server's process gave them, or by a ComfyUI on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .check import starters


def act_for(folders: list[str], texts: list[str], capability: tuple[int, int] | None) -> None:
    """From now on, in this process: these are the host's model folders and those of its text encoders, and this is the
    capability of its device.

    For helper processes only.
    """
    package: Any = sys.modules[__package__]
    package.model_folders = lambda: list(folders)
    package.text_folders = lambda: list(texts)
    package.capability = lambda: capability


def start_when_needed(path: str, tell: Callable[[], None]) -> None:
    """Let this process have the ComfyUI at `path` once something is asked that only ComfyUI knows (check.is_there), as
    what model a file is. On the CPU: names and shapes are looked at, and the server's process has the device. `tell` is
    called before."""
    def start() -> None:
        tell()
        sys.path.insert(0, path)
        arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  # reads sys.argv once
        sys.argv = arguments

    starters.append(start)

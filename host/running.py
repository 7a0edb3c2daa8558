"""A node that waits for something elsewhere: its progress, its words, and whether the user has cancelled it."""

from __future__ import annotations

import sys
from typing import Any

from .check import lacking
from .server import server


class Waiting:
    """What one run of a node shows while it waits. Made by the node as it starts; does nothing outside of ComfyUI."""

    def __init__(self) -> None:
        self._node: str | None = None
        self._bar: Any = None
        if "comfy" in sys.modules and not lacking("progress"):
            from comfy.utils import ProgressBar

            self._bar = ProgressBar(100)
        if "comfy" in sys.modules and not lacking("words on nodes"):
            from comfy_execution.utils import get_executing_context

            context = get_executing_context()
            self._node = context.node_id if context else None

    def cancelled(self) -> bool:
        """Whether the user has pressed Cancel since; `stop` then raises."""
        if self._bar is None:
            return False
        import comfy.model_management

        return comfy.model_management.processing_interrupted()

    def stop(self) -> None:
        """Raise the host's own interruption where the user has pressed Cancel."""
        if self._bar is not None:
            import comfy.model_management

            comfy.model_management.throw_exception_if_processing_interrupted()

    def show(self, done: float, total: float, picture: Any = None) -> None:
        """Move the bar to `done` of `total`, with a PIL picture as preview. Raises the host's interruption."""
        if self._bar is not None:
            preview = ("JPEG", picture, 512) if picture is not None else None
            self._bar.update_absolute(done, total, preview)

    def say(self, words: str) -> None:
        """A line on the node, in the page that queued it."""
        there = server()
        if self._node is not None and there is not None:
            there.send_progress_text(words, self._node, there.client_id)

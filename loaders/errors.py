"""The one error a user of this pack meets."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """Something about a checkpoint or a request that this pack refuses.

    ComfyUI shows the text of an exception as it is, so it answers three questions: what is wrong, where, what to do.
    """

    def __init__(self, what: str, where: object = "", do: str = "") -> None:
        text = what
        if where:
            text += f"\n  where: {where}"
        if do:
            text += f"\n  what to do: {do}"
        super().__init__(text)
        self.what, self.where, self.do = what, where, do


class MissingFiles(CheckpointError):
    """Files of a reference are not where they were looked for; another place, or a download, may have them."""


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"

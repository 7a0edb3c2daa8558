"""The one error a user of this pack meets. It lives on the lowest floor, for the host can be what is wrong, too."""

from __future__ import annotations

from .texts import Text, brief, said


class CheckpointError(ValueError):
    """Something about a checkpoint, a request or this ComfyUI that this pack refuses.

    ComfyUI shows the text of an exception as it is, so it answers three questions: what is wrong, where, what to do;
    in the language of whoever reads it (texts.py). Its API names the class, with the module that it says it is of: a
    pack's modules are called by their folder there.
    """

    __module__ = "quantized_transformers"

    def __init_subclass__(cls) -> None:
        cls.__module__ = CheckpointError.__module__

    def __init__(self, what: str | Exception, where: object = "", do: str = "") -> None:
        """`what` may be an exception, for what that says."""
        what = brief(Text("{error}", error=what) if isinstance(what, Exception) else what)
        text: str = what
        if where:
            text = Text("{text}\n  where: {where}", text=text, where=brief(str(where)))
        if do:
            text = Text("{text}\n  what to do: {do}", text=text, do=do)
        super().__init__(str.__str__(text))
        self.what, self.where, self.do, self.text = what, where if isinstance(where, str) else str(where), do, text

    def __str__(self) -> str:
        return said(self.text)


class HostChanged(CheckpointError):
    """This ComfyUI lacks something that a part of this pack leans on; only that part does not work."""

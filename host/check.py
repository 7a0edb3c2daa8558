"""Whether this ComfyUI has what contract.py says, asked once for each feature, when it is first used.

By name and by call (touches.py): nothing is concluded from a version number. What is missing turns off just the feature
that needs it, with one sentence that says what is missing, what does not work without it, and what to do.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import HostChanged
from .texts import Text

DO = Text("update this pack; if it is the newest, report this with what `doctor` says")
logger = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


def version() -> str:
    """ComfyUI's version, or "not found" outside of it."""
    try:
        import comfyui_version
        return comfyui_version.__version__
    except ImportError:
        return Text("not found")


def is_there() -> bool:
    """Whether there is a ComfyUI in this process, started now where the command line or a helper can (`starters`)."""
    while "comfy" not in sys.modules and starters:  # one that lies on sys.path is not yet one that runs here
        starters.pop()()
    return "comfy" in sys.modules or importlib.util.find_spec("comfy") is not None


starters: list[Callable[[], None]] = []  # what puts a ComfyUI into a process that has none, when one is needed


def lacking(feature: str) -> str:
    """One sentence when this ComfyUI lacks something that a feature needs, which is logged the first time; else empty.

    Where there is no ComfyUI there is nothing to ask: what needs it raises ImportError.
    """
    if "comfy" not in sys.modules and importlib.util.find_spec("comfy") is None:
        return ""
    return _lacking(feature)


@functools.cache
def _lacking(feature: str) -> str:
    from .contract import FEATURES  # when they are first needed: ComfyUI's start does without
    from .touches import parse, problem

    touches = map(parse, FEATURES[feature].touches)
    missing = [what for touch in touches if not touch.optional and (what := problem(touch))]
    if not missing:
        return ""
    shown = ", ".join(missing[:3])
    sentence = Text("ComfyUI {version} lacks {missing}: {stops}", version=version(), stops=FEATURES[feature].stops,
                    missing=Text("{shown} and {count} more", shown=shown, count=len(missing) - 3)
                    if len(missing) > 3 else shown)
    logger.warning("Quantized Transformers: %s (%s)", sentence, DO)
    found_lacks.append(sentence)
    return sentence


found_lacks: list[str] = []  # the sentences of this process so far, for reports


def require(*features: str) -> None:
    """Raise HostChanged when this ComfyUI lacks something that one of these features needs."""
    for feature in features:
        if sentence := lacking(feature):
            raise HostChanged(sentence, "", DO)


def needs(*features: str) -> Callable[[Function], Function]:
    """A function of this folder that raises HostChanged instead of running where the host lacks what it needs."""
    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            require(*features)
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def all_lacks() -> dict[str, str]:
    """Feature -> sentence, for every feature of the contract that this ComfyUI cuts short."""
    from .contract import FEATURES

    return {feature: sentence for feature in FEATURES if (sentence := lacking(feature))}

"""Whether this ComfyUI has what contract.py says, asked once for each feature, when it is first used.

By name and by call: nothing is concluded from a version number. What is missing turns off just the feature that needs
it, with one sentence that says what is missing, what does not work without it, and what to do.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from .errors import HostChanged

DO = "update this pack; if it is the newest, report this with what `doctor` says"
logger = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


def version() -> str:
    """ComfyUI's version, or "not found" outside of it."""
    try:
        import comfyui_version
        return comfyui_version.__version__
    except ImportError:
        return "not found"


class Touch(NamedTuple):
    """A line of the contract. `maker`: the function whose class is meant; `attribute`: of what the class at the end of
    `path` makes; `call`: (positional arguments, keywords)."""

    module: str
    maker: str
    path: tuple[str, ...]
    attribute: str
    call: tuple[int, tuple[str, ...]] | None
    optional: bool

    @property
    def name(self) -> str:
        """As a person would write it."""
        return ".".join(filter(None, (self.module, self.maker, *self.path, self.attribute)))


def parse(line: str) -> Touch:
    """A line of contract.py as a value."""
    match = re.fullmatch(r"([\w.]+):(?:(\w+)\(\)>)?([\w.]+)(?:->(\w+))?(?:\((.*)\))?( \?)?", line)
    assert match, line
    module, maker, path, attribute, arguments, optional = match.groups()
    call = None
    if arguments is not None:
        names = [name.strip() for name in arguments.split(",") if name.strip()]
        keywords = tuple(name[:-1] for name in names if name.endswith("="))
        call = (len(names) - len(keywords), keywords)
    return Touch(module, maker or "", tuple(path.split(".")), attribute or "", call, bool(optional))


def problem(touch: Touch) -> str:
    """What is missing of this line here; empty when nothing is."""
    if touch.module == "server" and "server" not in sys.modules:  # outside of a server there is nothing to ask
        return ""
    try:
        held: Any = importlib.import_module(touch.module)
    except Exception as error:  # whatever a module of another version raises
        return f"{touch.module} ({type(error).__name__}: {error})"
    if touch.maker:
        maker = getattr(held, touch.maker, None)
        if maker is None:
            return f"{touch.module}.{touch.maker}"
        held = maker()
    for name in touch.path:
        if not hasattr(held, name):
            return touch.name
        held = getattr(held, name)
    if touch.attribute and not _used(held, touch.attribute):
        return touch.name
    return f"{touch.name}({_shown(touch.call)})" if touch.call and not binds(_signature(held), touch.call) else ""


def binds(signature: inspect.Signature | None, call: tuple[int, tuple[str, ...]]) -> bool:
    """Whether a call with so many positional arguments and these keywords fits a signature (None: unknown)."""
    try:
        if signature is not None:
            signature.bind(*range(call[0]), **dict.fromkeys(call[1]))
    except TypeError:
        return False
    return True


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return None


def _shown(call: tuple[int, tuple[str, ...]]) -> str:
    return ", ".join((*("_" * call[0]), *(f"{name}=" for name in call[1])))


def _used(cls: Any, name: str) -> bool:
    """Whether a class has this attribute, or its methods use it: what instances have is not seen in their class."""
    return hasattr(cls, name) or any(
        name in code.co_names for base in inspect.getmro(cls) for method in vars(base).values()
        if (code := getattr(getattr(method, "fget", method), "__code__", None)) is not None)


def lacking(feature: str) -> str:
    """One sentence when this ComfyUI lacks something that a feature needs, which is logged the first time; else empty.

    Where there is no ComfyUI there is nothing to ask: what needs it raises ImportError.
    """
    if "comfy" not in sys.modules and importlib.util.find_spec("comfy") is None:
        return ""
    return _lacking(feature)


@functools.cache
def _lacking(feature: str) -> str:
    from .contract import FEATURES  # when it is first needed: ComfyUI's start does without

    touches = map(parse, FEATURES[feature].touches)
    missing = [what for touch in touches if not touch.optional and (what := problem(touch))]
    if not missing:
        return ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    sentence = f"ComfyUI {version()} lacks {', '.join(missing[:3])}{more}: {FEATURES[feature].stops}"
    logger.warning("Quantized Transformers: %s (%s)", sentence, DO)
    found.append(sentence)
    return sentence


found: list[str] = []  # the sentences of this process so far, for reports


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

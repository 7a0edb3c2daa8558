"""One line of contract.py as a value, and whether the ComfyUI that runs has what it says.

Apart from check.py because ComfyUI's start needs none of it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any, NamedTuple


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

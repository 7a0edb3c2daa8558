"""Who wrote a file: the registry of families (base.py says what one is)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..containers.checkpoint import Checkpoint
    from .base import Family

# Modules with a FAMILY, the most specific first: the first that knows a folder, or recognises a file, has it.
FAMILIES = ("gguf", "gptq", "tinychat", "nunchaku", "modelslim", "comfy", "compressed_tensors", "sdnq", "rows",
            "bitsandbytes", "modelopt")


@cache
def families() -> tuple[Family, ...]:
    """All families, imported when they are first needed: ComfyUI's start does without."""
    return tuple(import_module(f".{name}", __name__).FAMILY for name in FAMILIES)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of an opened checkpoint."""
    return next(family for family in families() if family.recognise(checkpoint))


def choices_of(inputs: Mapping[str, Any]) -> Any:
    """What only one family knows of among a node's inputs, as its own value; None when there is no such input."""
    return next((found for family in families() if (found := family.choices(inputs)) is not None), None)


def named(name: str) -> Family:
    """A family by its name."""
    return next(family for family in families() if family.name == name)

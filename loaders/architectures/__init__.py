"""The registry of architectures. A new one is one file with an `Architecture` and one line here."""

from __future__ import annotations

from .base import Architecture, Dims, Module, Naming
from .flux1 import FLUX1
from .others import name_other

ARCHITECTURES: tuple[Architecture, ...] = (FLUX1,)

__all__ = ["ARCHITECTURES", "Architecture", "Dims", "Module", "Naming", "by_class_name", "name_other", "supported"]


def by_class_name(class_name: str) -> Architecture | None:
    """The architecture of a diffusers `_class_name`, or None."""
    return next((a for a in ARCHITECTURES if class_name in a.class_names), None)


def supported() -> str:
    """The names of all supported architectures, for messages."""
    return ", ".join(a.name for a in ARCHITECTURES)

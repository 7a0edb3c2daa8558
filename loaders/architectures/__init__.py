"""The registry of architectures. A new one is one file with an `Architecture` and one line here."""

from __future__ import annotations

from typing import cast

from . import diffusers_classes
from .base import Architecture, Dims, Module, Naming
from .diffusers_classes import DERIVED
from .flux1 import FLUX1
from .flux2 import FLUX2
from .hunyuan_video import HUNYUAN_VIDEO
from .others import name_other
from .passthrough import Named
from .qwen_image import QWEN_IMAGE
from .sdxl import SDXL
from .wan import WAN
from .z_image import Z_IMAGE

ARCHITECTURES: tuple[Architecture, ...] = (FLUX1, FLUX2, HUNYUAN_VIDEO, QWEN_IMAGE, SDXL, WAN, Z_IMAGE)

__all__ = ["ARCHITECTURES", "Architecture", "Dims", "Module", "Naming", "by_class_name", "by_name", "diffusers_classes",
           "is_known", "name_other",
           "supported"]


def by_class_name(class_name: str) -> Architecture | None:
    """The architecture of a diffusers `_class_name`, or None."""
    return next((a for a in ARCHITECTURES if class_name in a.class_names), None)


def by_name(name: str) -> Architecture:
    """The architecture of this name; of a model that only the host knows, no more than the name."""
    return next((a for a in ARCHITECTURES if a.name == name), cast(Architecture, Named(name)))


def is_known(class_name: str) -> bool:
    """Whether a diffusers `_class_name` is that of a transformer that loads by a table, written or derived."""
    return by_class_name(class_name) is not None or bool(diffusers_classes.of_class(class_name))


def supported() -> str:
    """The names of all architectures that load unquantized, too, for messages."""
    return ", ".join([*(a.name for a in ARCHITECTURES if a.class_names), *(one.title for one in DERIVED)])

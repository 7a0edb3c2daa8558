"""Who multiplies by tiles: the registry of kernels (base.py says what one is)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ...host.texts import Text

if TYPE_CHECKING:
    from .base import Kernel

# Modules with `get(variant)`, in the order in which they are preferred; a kernel is called as its module is, with
# ":variant" where it has several.
MODULES = ("torch_npu", "at_load", "triton", "comfy_kitchen", "reference", "nunchaku", "flashinfer")


@cache
def kernel(name: str) -> Kernel:
    """A kernel by its name; "" and "dequantize" are the dequantized matmul. Raises ValueError for any other name."""
    from .base import DEQUANTIZE

    module, _, variant = name.partition(":")
    if module in ("", "dequantize"):
        return DEQUANTIZE
    if module not in MODULES:
        raise ValueError(Text("kernel {name!r} is none of {names}", name=name, names=", ".join(MODULES)))
    found: Kernel = import_module(f".{module}", __name__).get(variant)
    return found


def kernels() -> tuple[Kernel, ...]:
    """All kernels but the dequantized matmul, in the order of preference."""
    return tuple(map(kernel, MODULES))

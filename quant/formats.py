"""The registry of stored formats: what a Linear layer's tensors are, from dtypes and shapes alone.

A module of quant/codecs with `FORMATS` (`StoredFormat`s) is asked for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

from ..host.texts import Text
from .codecs import MODULES
from .stored import PLAIN, Leaves, StoredFormat


@lru_cache(maxsize=1)
def formats() -> tuple[StoredFormat, ...]:
    """All formats that this version tells by a layer's tensors, in the order of the codecs; plain comes last."""
    found = [import_module(f".codecs.{name}", __package__) for name in MODULES]
    return (*(fmt for module in found for fmt in getattr(module, "FORMATS", ())), PLAIN)


def identify(leaves: Leaves) -> StoredFormat | None:
    """The format of a layer, or None when no format of this version matches."""
    return next((fmt for fmt in formats() if fmt.matches(leaves)), None)


def name_unsupported(leaves: Mapping[str, Any]) -> str:
    """Name a stored layer that `identify` does not know, for the refusal's message."""
    weight = leaves.get("weight")
    dtype = weight.dtype if weight is not None else ""
    scale = leaves.get("weight_scale")
    if "wscales" in leaves or "proj_down" in leaves:
        return "Nunchaku SVDQuant"
    if "qweight" in leaves:
        return Text("GPTQ/AWQ packed integers")
    if "deq_scale" in leaves or "weight_offset" in leaves:
        return Text("Ascend ModelSlim")
    if dtype.startswith("F8") and scale is not None and scale.dtype in ("U8", "F8_E8M0"):
        return "MXFP8"
    if dtype in ("I8", "U8") and "scale" in leaves:
        return Text("integers with scale and zero_point (SDNQ and others)") if "zero_point" in leaves else \
            Text("integers with scale (SDNQ and others)")
    if dtype == "I8":
        return "INT8" if scale is not None else Text("INT8 without weight_scale")
    return Text("{dtype} weights", dtype=dtype) if dtype else Text("unknown weights")

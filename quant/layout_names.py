"""Layouts by their names. The host's INT8 has two: the host's, and one of this pack (layouts/int8.py says why)."""

from __future__ import annotations

from typing import Any

INT8, OWN_INT8 = "TensorWiseINT8Layout", "QTINT8Layout"
# Of the host's, those whose numbers a codec has, too.
HOST_LAYOUTS = frozenset({"TensorCoreFP8E4M3Layout", "TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout", INT8, OWN_INT8})


def is_int8(weight: Any) -> bool:
    """Whether a quantized weight is in it."""
    return weight._layout_cls in (INT8, OWN_INT8)

"""The host's INT8 layout by its two names: the host's, and the one of this pack (layouts/int8.py says why)."""

from __future__ import annotations

from typing import Any

INT8, OWN_INT8 = "TensorWiseINT8Layout", "QTINT8Layout"


def is_int8(weight: Any) -> bool:
    """Whether a quantized weight is in it."""
    return weight._layout_cls in (INT8, OWN_INT8)

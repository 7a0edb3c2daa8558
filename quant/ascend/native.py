"""A layer of msmodelslim as the host loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kinds import MARKER

if TYPE_CHECKING:
    from torch import Tensor


# Stored names -> suffixes of "weight" in this pack's layout; the layout's fields have the same names without "weight_".
OWN_LEAVES = ("scale", "offset", "dual", "mul", "input_scale", "input_offset", "quant_bias", "bias")


@dataclass(frozen=True)
class NativeLayer:
    """One layer as the host loads it.

    `tensors`: leaf ("weight", "weight_scale", "comfy_quant", "bias", ...) -> tensor, to be put under the native layer's
    name. `layout`: what `comfy_quant` says, or "" for an unquantized layer. `kind`: of kinds.KINDS, or "".
    `needs_own_ops`: whether ops.with_ascend must load it. `notes`: lines for the report.
    """

    tensors: dict[str, Tensor]
    rows: int
    columns: int
    kind: str = ""
    layout: str = ""
    notes: tuple[str, ...] = ()

    @property
    def needs_own_ops(self) -> bool:
        return self.layout.startswith(MARKER)


def smoothing(name: str, part: dict[str, Tensor]) -> Tensor | None:
    """The smoothing vector as F32 [columns], or None when there is none or it is all ones."""
    mul = part.get("mul_scale")
    if mul is None or bool((mul == 1).all()):
        return None
    if not bool(mul.isfinite().all()) or bool((mul == 0).any()):
        raise ValueError(f"{name}.mul_scale has zeros, infinities or NaN")
    return mul.float()


def float_bias(name: str, part: dict[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    stored = part.get("bias")
    if not wanted and stored is not None and bool((stored != 0).any()):
        raise ValueError(f"{name}.bias is stored but this layer of the model has none")
    return {"bias": stored} if stored is not None and wanted else {}

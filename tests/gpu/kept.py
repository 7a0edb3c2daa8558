"""Stage 14: steps of FLUX.1 at 1024 x 1024 with decoded weights kept (docs/triton.md) beside the same without, and BF16.
Without ComfyUI's dynamic VRAM, whose weights are not kept."""

from __future__ import annotations

from typing import Any

from .layers import Arm
from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 300
DECODED = {"fp8, decoded": Arm("fp8", "shards", ""), "nvfp4": ARMS["nvfp4"], "svdq int4, dequantized": ARMS["svdq int4, dequantized"]}


def run(rows: Rows, where: Where) -> None:
    measured(rows, "bf16", "FLUX.1", ARMS["bf16"], where, lambda patcher: step(patcher, where))
    for name, arm in DECODED.items():
        measured(rows, name, "FLUX.1", arm, where, lambda patcher: step(patcher, where))
        measured(rows, f"{name}, kept", "FLUX.1", arm, where, lambda patcher: _kept(patcher, where))


def _kept(patcher: Any, where: Where) -> dict[str, Any]:
    from quantized_transformers.loaders import kept

    patcher, report = kept.apply(patcher)
    return {"report": report, **step(patcher, where)}

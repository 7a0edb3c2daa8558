"""Stages 11 to 13: steps of FLUX.1 with half the memory that its weights need: as ComfyUI keeps memory by itself, without
its dynamic VRAM, and without pinned memory."""

from __future__ import annotations

from typing import Any

import torch

from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 240


def run(rows: Rows, where: Where) -> None:
    for name in ("bf16", "fp8", "svdq int4, comfy-kitchen"):
        measured(rows, name, "FLUX.1", ARMS[name], where, lambda patcher: _low(patcher, where))


def _low(patcher: Any, where: Where) -> dict[str, Any]:
    """With so much of the GPU's memory taken that half of the weights fit beside what a step needs."""
    side, taken = where.size.pixels // 8, None
    room = int(patcher.model_size() // 2 + patcher.memory_required([2, 16, side, side])) + 2 ** 30
    if where.cuda:
        free = torch.cuda.mem_get_info()[0]
        if free > room:
            taken = torch.empty(free - room, dtype=torch.uint8, device=where.device)
    try:
        return {"vram": where.memory, "weights": int(patcher.model_size()), "room": room, **step(patcher, where)}
    finally:
        del taken

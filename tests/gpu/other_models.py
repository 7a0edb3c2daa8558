"""Stage 9: one block of Wan 2.2 14B and of Qwen-Image at the token numbers they run with."""

from __future__ import annotations

from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 300


def run(rows: Rows, where: Where) -> None:
    for name in ("bf16", "fp8", "nvfp4", "int8"):
        # 33 frames are 9 of latents, 832 squared pixels 52 x 52 tokens of each: 24,336
        measured(rows, f"Wan, {name}", "Wan", ARMS[name], where, lambda patcher: step(patcher, where, 832, 33), num_layers=1)
        measured(rows, f"Qwen-Image, {name}", "Qwen-Image", ARMS[name], where,
                 lambda patcher: step(patcher, where, 1328 + 16), num_layers=1)

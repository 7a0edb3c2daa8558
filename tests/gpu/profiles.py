"""Stage 8: which kernels a step of FLUX.1 spends its time in, and whether a pass over the activations is among them."""

from __future__ import annotations

from typing import Any

from .machine import Where
from .models import ARMS, measured
from .rows import Rows

LIMIT = 240
TOP = 25


def run(rows: Rows, where: Where) -> None:
    for name in ("bf16", "fp8", "nvfp4", "svdq int4, comfy-kitchen"):
        measured(rows, name, "FLUX.1", ARMS[name], where, lambda patcher: _profile(patcher, where))


def _profile(patcher: Any, where: Where) -> dict[str, Any]:
    from quantized_transformers.makers.bench.measure import profile, random_conditioning, random_latent

    pixels = where.size.pixels
    found = profile(patcher, random_latent(patcher, pixels, pixels), random_conditioning(patcher))
    total = sum(seconds for _, seconds, _ in found)
    return {"seconds": total, "kernels": len(found), "calls": sum(calls for *_, calls in found),
            "largest_of_activations": any("amax" in kernel.lower() for kernel, *_ in found),
            "top": [[kernel[:120], seconds, calls] for kernel, seconds, calls in found[:TOP]]}

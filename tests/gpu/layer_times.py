"""Stage 3: times of single Linears, the shapes of FLUX.1's blocks by tokens, every arm that stage 2 passed."""

from __future__ import annotations

from typing import Any

import torch

from . import layers
from .layers import BF16, Arm
from .machine import Where, timed
from .rows import Rows

LIMIT = 600
# Where the Triton kernels' two ways cross (quant/kernels/triton_code/shapes.py): a codec for every kind of decoding.
WAYS, CROSSING = ("triton:fused", "triton:memory"), ("fp8_blocks", "nvfp4", "u4_groups", "ggml_q4_k")
TOKENS = (16, 64, 128, 256, 512, 1024)


def shapes(where: Where) -> list[tuple[int, int]]:
    """[out, in] of FLUX.1's qkv, proj, mlp.0, mlp.2, linear1, linear2."""
    h = where.size.hidden
    found = [(3 * h, h), (h, h), (4 * h, h), (h, 4 * h), (7 * h, h), (h, 5 * h)]
    return found[:1] if where.tiny else found


def run(rows: Rows, where: Where) -> None:
    from quantized_transformers.quant.kernels.choose import here

    passed = [arm for arm in layers.arms(here()) if not rows.failed(arm.key)]
    if where.tiny:  # one of each layout
        passed = [arm for arm in passed if arm.codec in ("plain", "fp8", "svdq_int4", "w8a8_dynamic")]
    crossing = both_ways(passed)
    for n, k in shapes(where):
        for arm in (*passed, *(crossing if (n, k) in shapes(where)[:2] else ())):
            if arm != BF16:
                tokens = TOKENS if arm in crossing else where.size.tokens
                rows.measure(f"{n}x{k} {arm.key}", lambda arm=arm, n=n, k=k, tokens=tokens: _times(arm, n, k, tokens, where))


def both_ways(arms: list[Arm]) -> list[Arm]:
    """The Triton kernel's arms once more, each way by itself."""
    return [Arm(arm.codec, arm.layout, way) for arm in arms for way in WAYS
            if arm.kernel == "triton" and arm.layout == "tiles" and arm.codec in CROSSING]


def _times(arm: Arm, n: int, k: int, tokens: tuple[int, ...], where: Where) -> dict[str, Any]:
    """Seconds by tokens, each beside a BF16 layer of the same shape in turns with it."""
    plain, module = (layers.linear(one, n, k, where) for one in (BF16, arm))
    found: dict[str, Any] = {"arm": arm.key, "shape": [n, k], "times": {}}
    for count in tokens:
        x = torch.randn(count, k, device=where.device).to(torch.bfloat16 if where.cuda else torch.float32)
        times = timed({"bf16": lambda x=x: plain(x), "x": lambda x=x: module(x)}, where)
        found["times"][str(count)] = {"bf16": times["bf16"][0], "seconds": times["x"][0], "launch": times["x"][1]}
    last = found["times"][str(tokens[-1])]
    return {**found, "over_bf16": last["seconds"] / last["bf16"]}

"""Stage 1: what this card can do at all, for all the others to be held against."""

from __future__ import annotations

import torch

from .machine import Where, timed
from .rows import Rows

LIMIT = 120


def run(rows: Rows, where: Where) -> None:
    rows.measure("copy", lambda: _copy(where))
    rows.measure("bf16 matmul", lambda: _matmul(where))
    for fast in (False, True):
        rows.measure(f"fp8 matmul{', fast accumulation' if fast else ''}", lambda fast=fast: _fp8(where, fast))


def _copy(where: Where) -> dict[str, float]:
    source = torch.empty(2 ** (20 if where.tiny else 31), dtype=torch.uint8, device=where.device)
    target = torch.empty_like(source)
    seconds, _ = timed({"x": lambda: target.copy_(source)}, where)["x"]
    return {"seconds": seconds, "bytes_per_second": 2 * source.numel() / seconds}


def _shapes(where: Where) -> tuple[int, int, int]:
    return (16, 64, 64) if where.tiny else (4608, 3072, 12288)


def _matmul(where: Where) -> dict[str, float]:
    m, k, n = _shapes(where)
    x, w = (torch.randn(*shape, device=where.device).to(torch.bfloat16) for shape in ((m, k), (n, k)))
    seconds, launch = timed({"x": lambda: torch.nn.functional.linear(x, w)}, where)["x"]
    return {"seconds": seconds, "launch": launch, "flops": 2 * m * k * n / seconds}


def _fp8(where: Where, fast: bool) -> dict[str, float]:
    m, k, n = _shapes(where)
    x, w = (torch.randn(*shape, device=where.device).to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
    one = torch.ones((), device=where.device)

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    exact = x.double() @ w.double().t()
    error = float((multiply().double() - exact).norm() / exact.norm())
    seconds, launch = timed({"x": multiply}, where)["x"]
    return {"seconds": seconds, "launch": launch, "flops": 2 * m * k * n / seconds, "relative_l2": error}

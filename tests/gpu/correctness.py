"""Stage 2: every codec in every layout by every kernel, against its definition in F64, before anything is timed.

Two bounds. Against the exact product of the activation as it comes and the dequantized weight: what the format itself
costs, which catches wrong orders, scales and rows. Against comfy-kitchen's plain torch ("eager") on the same device,
which quantizes activations by the same rules: two roundings to BF16, which catches everything else. Memory that outputs
are likely to get is filled with NaN first, so that what a kernel does not write shows.
"""

from __future__ import annotations

from typing import Any

import torch

from . import layers
from .layers import Arm
from .machine import Where
from .rows import Rows

LIMIT = 600  # the Triton kernels are compiled here, some two hundred of them
# Relative RMS of what a format makes of normally distributed activations, with a margin of two: the mantissa of E4M3;
# NVFP4's and MXFP4's blocks; half a step of 1/127 and of 1/7 of the largest of a row, of 64 columns.
NOISE = {"fp8": 0.055, "nvfp4": 0.2, "w8a8": 0.03, "w8a8_dynamic": 0.03, "w4a4_dynamic": 0.5, "w4a8_dynamic": 0.03,
         "wfp8afp8_dynamic": 0.055, "w8a8_mxfp8": 0.055, "w4a8_mxfp": 0.055, "w4a4_mxfp4": 0.3,
         **dict.fromkeys(("int8_convrot16", "int8_convrot64", "int8_convrot256"), 0.03),
         "w4a4_mxfp4_dualscale": 0.3, "svdq_int4": 0.25, "svdq_int4_unsigned": 0.25, "svdq_nvfp4": 0.2}
EXACT = 0.006  # weight, activation and output rounded to BF16 once or twice each
EAGER = 0.008


def run(rows: Rows, where: Where) -> None:
    from quantized_transformers.quant.kernels.choose import here

    machine = here()
    for arm in sorted(layers.arms(machine), key=lambda arm: (arm.kernel not in ("", "host"), arm.codec)):
        rows.measure(arm.key, lambda arm=arm: check(arm, where))


def check(arm: Arm, where: Where) -> dict[str, Any]:
    """The worst errors over all numbers of rows, and whether they are within bounds."""
    rows, columns = (96, 256) if where.tiny else (3072, 3072)
    module = layers.linear(arm, rows, columns, where)
    weight, shift = layers.weight(arm, rows, columns)
    weight = weight.to(where.device)
    found: dict[str, Any] = {"arm": arm.key, "exact": 0.0, "eager": 0.0, "finite": True}
    before = _fingerprint(module)
    for count in where.size.tokens if where.tiny else (1, 7, 64, 512, 4608):
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).clamp(-4.4, 4.4)
        if arm.codec == "svdq_int4_unsigned":
            x = x.abs()  # what such layers get: a GELU's output, shifted
        x = x.to(where.device, torch.bfloat16 if where.cuda else torch.float32)
        expected = x.double() @ weight.t()
        if shift is not None:
            expected = expected + shift.to(where.device)
        out, eager = _run(module, x, count * rows), _eager(module, x)
        found["finite"] &= bool(torch.isfinite(out).all())
        found["exact"] = max(found["exact"], _relative(out, expected))
        found["eager"] = max(found["eager"], _relative(out, eager))
        if (out.dtype, tuple(out.shape)) != (x.dtype, (count, rows)):
            raise ValueError(f"{count} rows give {out.dtype} {list(out.shape)}")
    bound = EXACT if arm.kernel in ("", "triton") or arm.codec not in NOISE else NOISE[arm.codec]
    untouched = _fingerprint(module) == before
    return {**found, "bound": bound, "untouched": untouched,
            "ok": found["finite"] and untouched and found["exact"] <= bound and found["eager"] <= EAGER}


def _run(module: torch.nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    poison = [torch.full((size,), float("nan"), dtype=x.dtype, device=x.device) for _ in range(3)]
    del poison  # the allocator hands the same memory out again
    with torch.inference_mode():
        return module(x).clone()


def _eager(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    import comfy_kitchen

    with comfy_kitchen.use_backend("eager"), torch.inference_mode():
        return module(x)


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())


def _fingerprint(module: torch.nn.Module) -> list[int]:
    """Sums over the bytes of all tensors: kernels must not write into weights."""
    found = []
    for tensor in module.state_dict().values():
        flat = tensor.detach().contiguous().reshape(-1)
        found.append(int(flat.view(torch.uint8).sum(dtype=torch.int64)))
    return found

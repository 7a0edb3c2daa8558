"""Integer codes: how an NPU quantizes activations to INT8 and INT4, packs them and multiplies them.

Rules are those of CANN's kernels (docs/sources/ascend.md, "Static W8A8" and "Dynamic integers"). comfy-kitchen divides
by the scale where the NPU multiplies by its reciprocal; the two differ at near-ties only.
"""

from __future__ import annotations

import torch

from . import mx

AT_ONCE = 256
EXACT_COLUMNS = 1024  # 2^14 a product: sums of this many INT8 products are below 2^24, so exact in F32


def per_token(x: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (codes I8 [M, K], scale F32 [M]), symmetric with one scale a token; `level` is 127 or 7.

    With a = amax of the token: codes = round half to even(x * (level / a)), scale = a * (1 / level), all in F32; a
    token of zeros has scale 0.
    """
    x = x.float()
    amax = x.abs().amax(-1)
    top = torch.full_like(amax, level)  # scalar / tensor would multiply by a rounded reciprocal
    codes = (x * (top / amax)[:, None]).nan_to_num(0.0).round().clamp(-level - 1, level)  # 0 * inf for zeros
    return codes.to(torch.int8), amax * (1 / level)


def static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """x [M, K] -> codes I8 with one stored scale and offset: round half to even(x * (1 / scale) + offset), clamped."""
    codes = x.float() * (1 / scale.float()) + offset.float()
    return codes.round().clamp(-128, 127).to(torch.int8)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """I8 [M, K] times I8 [K, N] -> I32 [M, N], exact on any device: F32 sums of at most 1024 columns at a time, for 256
    of b's columns at a time (the rows of a weight), so that F32 of them stays in a processor's cache."""
    wide, weight = a.float().t(), b.t()
    made = torch.empty(len(weight), len(a), dtype=torch.int32, device=a.device)
    step = AT_ONCE if a.device.type == "cpu" else max(len(weight), 1)
    for rows, out in zip(weight.split(step), made.split(step), strict=True):
        part = rows.float()
        for i, (x, y) in enumerate(zip(part.split(EXACT_COLUMNS, 1), wide.split(EXACT_COLUMNS), strict=True)):
            sums = (x @ y).to(torch.int32)
            out.copy_(sums) if i == 0 else out.add_(sums)
    return made.t()


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """U8 [N, K / 2], even columns in the low nibble -> I8 -8..7 [N, K]."""
    return (mx.unpack(packed).view(torch.int8) << 4) >> 4


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """I8 [N / 2, K] packed along rows (row 2i in the low nibble, 2i + 1 in the high one) -> I8 -8..7 [N, K]."""
    packed = packed.view(torch.int8)
    return torch.stack(((packed << 4) >> 4, packed >> 4), 1).flatten(0, 1)


def quantize_rows(weight: torch.Tensor, level: int, groups: int = 1,
                  seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] -> (codes I8 [N, K], scale F32 [N, groups] = amax / level), stochastic with a seed."""
    blocks = weight.float().unflatten(1, (groups, -1))
    scale = (blocks.abs().amax(-1) / level).clamp(min=torch.finfo(torch.float32).eps)
    values = (blocks / scale[..., None]).flatten(1)
    values = (values + mx.noise(values, seed)).floor() if seed else values.round()
    return values.clamp(-level - 1, level).to(torch.int8), scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """(code - offset) x scale in F32 [N, K]; scale and offset are [N, groups]."""
    values = codes.float().unflatten(1, (scale.shape[1], -1))
    if offset is not None:
        values = values - offset.float()[..., None]
    return (values * scale.float()[..., None]).flatten(1)


def deq_scale(stored: torch.Tensor) -> torch.Tensor:
    """A stored deq_scale -> F32 [N, 1]. I64 holds the bits of the F32 value in its low half; a cast gives garbage."""
    values = stored.to(torch.int32).view(torch.float32) if stored.dtype == torch.int64 else stored.float()
    return values.reshape(-1, 1)

"""MXFP8 by its definition (OCP MX), independent of the pack."""

from __future__ import annotations

import torch

NUMBERS = torch.tensor([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])


def mx(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] through MXFP8 and back, F32: exponent floor(log2 amax) - 8, nearest number of the E4M3 table,
    the even code of two, 448 at most."""
    blocks = weight.double().reshape(weight.shape[0], -1, 32)
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1 - 8
    scaled = torch.ldexp(blocks, -exponent)
    table = NUMBERS.double()
    upper = torch.bucketize(scaled.abs().contiguous(), table).clamp(max=len(table) - 1)
    lower = (upper - 1).clamp(min=0)
    up, down = table[upper] - scaled.abs(), scaled.abs() - table[lower]
    code = torch.where((up < down) | (up == down) & (upper % 2 == 0), upper, lower)
    return torch.ldexp(table[code] * scaled.sign(), exponent).reshape(weight.shape).float()

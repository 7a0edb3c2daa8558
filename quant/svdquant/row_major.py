"""SVDQuant NVFP4 in rows and columns, as vLLM-Omni's converter writes it, by the names of packing.py.

    qweight        U8 or I8 [N, K/2]   even column in the low nibble
    wscales        E4M3 [K/16, N]
    proj_down      16 bit [K, R]       proj_up [N, R]
    smooth_factor, wcscales, bias      in channel order, or still in Nunchaku's

The converter for Z-Image left vectors as they came from Nunchaku; what it became, and vLLM-Omni's own page on the
format, have them in channel order (docs/sources/nunchaku.md, "Other writers"). Neither says so in the file, so the
values are asked: a column of the quantized weight has been multiplied by its smooth factor, and is the larger for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import packing

MARGIN = 30.0  # as large as a chi-squared of one degree of freedom is once in 2e7 times
ROWS = 512  # of a layer that are read: each column's size to 4 %
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class RowMajor:
    """The order of one file. `packed_vectors`: vectors are in Nunchaku's order."""

    packed_vectors: bool

    def unpack_qweight(self, codes: Tensor) -> Tensor:
        """U8 or I8 [N, K/2] -> U8, a copy."""
        return codes.view(torch.uint8).clone()

    def unpack_micro_scales(self, scales: Tensor) -> Tensor:
        """E4M3 [K/16, N] -> [N, K/16]."""
        return scales.view(torch.uint8).t().contiguous().view(scales.dtype)

    def unpack_vector(self, vector: Tensor) -> Tensor:
        """16 bit [N] -> channel order, a copy."""
        return packing.unpack_vector(vector) if self.packed_vectors else vector.clone()

    def unpack_down(self, down: Tensor) -> Tensor:
        """16 bit [K, R], a copy."""
        return down.clone()

    def unpack_up(self, up: Tensor) -> Tensor:
        """16 bit [N, R], a copy."""
        return up.clone()


def evidence(codes: Tensor, scales: Tensor, smooth: Tensor) -> tuple[float, float]:
    """How much one layer speaks for its vectors being in channel order, and in Nunchaku's: for each, the square of
    Fisher's z of the correlation between a column's size and its smooth factor (logarithms, within the blocks of 128
    that the order permutes), which is chi-squared with one degree of freedom where there is none.

    `codes` U8 or I8 [N, K/2], `scales` E4M3 [K/16, N], `smooth` 16 bit [K], K a multiple of 128.
    """
    pairs = codes[:ROWS].view(torch.uint8)
    values = _E2M1[(torch.stack((pairs & 7, pairs >> 4 & 7), -1)).long()].view(len(pairs), -1, 16)
    sizes = (values * scales[:, :ROWS].t().float()[..., None]).view(len(pairs), -1).square().mean(0)
    if not bool((sizes > 0).all()):
        return 0.0, 0.0
    wanted = _within(sizes.log())
    return _score(wanted, smooth), _score(wanted, packing.unpack_vector(smooth))


def _within(logarithms: Tensor) -> Tensor:
    blocks = logarithms.double().view(-1, 128)
    return (blocks - blocks.mean(1, keepdim=True)).flatten()


def _score(wanted: Tensor, smooth: Tensor) -> float:
    found = _within(smooth.float().abs().clamp(min=1e-30).log())
    norms = float(wanted.norm() * found.norm())
    if not norms:
        return 0.0
    r = min(0.999, abs(float(wanted @ found)) / norms)
    return math.atanh(r) ** 2 * (len(found) * 127 / 128 - 3)


def packed_vectors(layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> bool | None:
    """Whether the vectors of a file with these layers (codes, scales, smooth) are in Nunchaku's order; None where the
    values do not tell."""
    natural = packed = 0.0
    for layer in layers:
        one, other = evidence(*layer)
        natural, packed = natural + one, packed + other
    low, high = sorted((natural, packed))
    return packed > natural if high - low > MARGIN and high > 4 * low else None

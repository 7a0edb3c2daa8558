"""ggml's types of two and three bits, whose codes are rows of a grid of 256 to 2048 vectors: F32, bit for bit those of
gguf-py. The grids are gguf-py's (package gguf), asked for when such a type is met; see blocks.py for what goes in and
out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from ...host.texts import Text
from .blocks import bits, constant, half, words


@lru_cache(maxsize=16)
def _grid(name: str, device: torch.device) -> Tensor:
    """F32 [vectors, values]. Raises ValueError where gguf is not installed."""
    try:
        kind = getattr(import_module("gguf.quants"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(Text("{format} weights need the package gguf, which has their grid (pip install gguf)",
                              format=name)) from error
    kind.init_grid()
    with torch.inference_mode(False):
        return torch.from_numpy(kind.grid.reshape(kind.grid_shape).copy()).to(device)


@lru_cache(maxsize=4)
def _even(device: torch.device) -> Tensor:
    """Seven sign bits -> eight, an even number of them set (ggml's ksigns_iq2xs): I32 [128]."""
    with torch.inference_mode(False):
        return torch.tensor([i | (i.bit_count() & 1) << 7 for i in range(128)], dtype=torch.int32, device=device)


def _vectors(name: str, codes: Tensor) -> Tensor:
    grid = _grid(name, codes.device)
    return grid.index_select(0, codes.reshape(-1).int()).view(*codes.shape, grid.shape[1])


def _signs(bytes_of: Tensor) -> Tensor:
    """Bytes [...] -> F32 [..., 8], -1 where a bit is set."""
    eight = constant(tuple(range(8)), torch.int32, bytes_of.device)
    return 1.0 - 2.0 * ((bytes_of.int().unsqueeze(-1) >> eight) & 1).float()


def _seven(packed: Tensor) -> Tensor:
    """I32 words [count, n] with four times seven sign bits -> F32 [count, n, 4, 8]."""
    seven = (packed.unsqueeze(-1) >> constant((0, 7, 14, 21), torch.int32, packed.device)) & 127
    return _signs(_even(packed.device).index_select(0, seven.reshape(-1)).view(seven.shape))


def _nibbles_in_pairs(data: Tensor) -> Tensor:
    """Bytes [count, n] -> F32 [count, 2 n]: low and high nibble of each."""
    return ((data.unsqueeze(-1) >> constant((0, 4), torch.uint8, data.device)) & 15).flatten(1).float()


def iq2_xxs(b: Tensor) -> Tensor:
    pairs = words(b[:, 2:], torch.int32).view(-1, 8, 2)
    d = half(b, 0) * (0.5 + (pairs[..., 1] >> 28 & 15).float()) * 0.25
    codes = b[:, 2:].reshape(-1, 8, 8)[..., :4]
    return (d[..., None, None] * _vectors("IQ2_XXS", codes) * _seven(pairs[..., 1])).flatten(1)


def iq2_xs(b: Tensor) -> Tensor:
    codes = words(b[:, 2:66], torch.int16)
    d = half(b, 0) * (0.5 + _nibbles_in_pairs(b[:, 66:])) * 0.25
    signs = _signs(_even(b.device).index_select(0, (codes >> 9).reshape(-1)).view(codes.shape)).view(-1, 16, 2, 8)
    return (d[..., None, None] * _vectors("IQ2_XS", codes & 511).view(-1, 16, 2, 8) * signs).flatten(1)


def iq2_s(b: Tensor) -> Tensor:
    high = (b[:, 66:74].unsqueeze(-1) >> constant((0, 2, 4, 6), torch.uint8, b.device)) & 3
    codes = b[:, 2:34].int() | high.flatten(1).int() << 8
    d = half(b, 0) * (0.5 + _nibbles_in_pairs(b[:, 74:])) * 0.25
    signs = _signs(b[:, 34:66]).view(-1, 16, 2, 8)
    return (d[..., None, None] * _vectors("IQ2_S", codes).view(-1, 16, 2, 8) * signs).flatten(1)


def iq3_xxs(b: Tensor) -> Tensor:
    packed = words(b[:, 66:], torch.int32)
    d = half(b, 0) * (0.5 + (packed >> 28 & 15).float()) * 0.5
    return (d[..., None, None] * _vectors("IQ3_XXS", b[:, 2:66]).view(-1, 8, 4, 8) * _seven(packed)).flatten(1)


def iq3_s(b: Tensor) -> Tensor:
    eight = constant(tuple(range(8)), torch.uint8, b.device)
    codes = b[:, 2:66].int() | ((b[:, 66:74].unsqueeze(-1) >> eight) & 1).flatten(1).int() << 8
    d = half(b, 0) * (1 + 2 * _nibbles_in_pairs(b[:, 106:]))
    signs = _signs(b[:, 74:106]).view(-1, 8, 4, 8)
    return (d[..., None, None] * _vectors("IQ3_S", codes).view(-1, 8, 4, 8) * signs).flatten(1)


def iq1_s(b: Tensor) -> Tensor:
    high = words(b[:, 34:], torch.int16)
    d = half(b, 0) * (2 * (high >> 12 & 7) + 1).float()
    delta = torch.where(high & 0x8000 == 0, 0.125, -0.125)
    upper = bits(high.unsqueeze(-1), (0, 3, 6, 9), 7).reshape(-1, 32)
    grid = _vectors("IQ1_S", b[:, 2:34].int() | upper << 8).view(-1, 8, 4, 8)
    return (d[..., None, None] * (grid + delta[..., None, None])).flatten(1)


def iq1_m(b: Tensor) -> Tensor:
    """32 bytes of codes, 16 of high bits and deltas, and four words: 12 bits of scales, 4 of d in each."""
    four = words(b[:, 48:], torch.int16)
    parts = (four & 0xF000) >> constant((12, 8, 4, 0), torch.int32, b.device)
    whole = parts[:, 0] | parts[:, 1] | parts[:, 2] | parts[:, 3]
    d = whole.to(torch.int16).view(torch.float16).float().unsqueeze(1)
    scales = ((four.unsqueeze(-1) >> constant((0, 3, 6, 9), torch.int32, b.device)) & 7).reshape(-1, 16)
    d = d * (2 * scales + 1).float()
    high = ((b[:, 32:48].unsqueeze(-1) >> constant((0, 4), torch.uint8, b.device)) & 15).flatten(1).int()
    delta = torch.where(high & 8 == 0, 0.125, -0.125).view(-1, 16, 2, 1)
    grid = _vectors("IQ1_S", b[:, :32].int() | (high & 7) << 8).view(-1, 16, 2, 8)
    return (d[..., None, None] * (grid + delta)).flatten(1)


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s, "IQ3_XXS": iq3_xxs, "IQ3_S": iq3_s, "IQ1_S": iq1_s,
    "IQ1_M": iq1_m}

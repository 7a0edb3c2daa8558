"""ggml's blocks -> numbers on a CPU, bit by bit what blocks.py gives and 2 to 4 times as fast.

All codes of many blocks are taken apart as bytes: shifted and masked eight at a time (numpy shifts words with the
processor's vectors, bytes one by one), then moved to where their values are in runs of 4 to 64 bytes, and become F32
all at once. Scales and minima are taken apart four at a time, as the bytes of a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..decode import ALONE, VALUES, each, looked_up, pairs, times
from . import Type, blocks

Bytes = np.ndarray  # U8 or I8 [count, bytes]
Scales = tuple[Tensor, Tensor | None]


class Rule(NamedTuple):
    """How a type is decoded: blocks U8 [count, bytes] -> `codes` [count, values] of a byte each, and `scales`, F32
    [count, groups of values]: what codes are multiplied by, and what is subtracted then. `table`: what 16 codes mean.
    """

    codes: Callable[[Bytes], Bytes]
    scales: Callable[[Bytes], Scales]
    table: tuple[int, ...] = ()


def decode_rows(codes: Tensor, kind: Type, out: Tensor) -> bool:
    """Blocks U8 [rows, bytes of a row] into F32 `out` [rows, columns]; False for types that are not here."""
    rule = RULES.get(kind.name)
    if rule is None:
        return False
    data, made = codes.contiguous().numpy().reshape(-1, kind.size), out.view(-1, kind.block)
    step, scaled = VALUES // kind.block, ALONE // -(-kind.block // 16)
    for start in range(0, len(data), scaled):
        some, of_some = data[start:start + scaled], made[start:start + scaled]
        scale, low = rule.scales(some)
        for first in range(0, len(some), step):
            part, values = torch.from_numpy(rule.codes(some[first:first + step])), of_some[first:first + step]
            if rule.table:
                looked_up(part.view(torch.int16), _pairs(rule.table), values, scale[first:first + step])
            else:
                times(values, scale[first:first + step], part)
            if low is not None:
                each(Tensor.sub_, values, low[first:first + step])
    return True


@cache
def _pairs(values: tuple[int, ...]) -> Tensor:
    return pairs(values, low_first=True, byte=8)


def _moved(b: Bytes, by: int, mask: int) -> Bytes:
    """Bytes shifted to the right (to the left where `by` is negative), and what a mask leaves of them."""
    wide = b.reshape(-1)
    if wide.size % 8 == 0:
        wide, mask = wide.view(np.uint64), mask * 0x0101010101010101
    found = wide >> by if by >= 0 else wide << -by
    found &= mask
    return found.view(np.uint8).reshape(b.shape)


def _run(b: Bytes, at: int, size: int) -> np.ndarray:
    """Bytes from `at` on as one item a block, to be moved as such."""
    return b[:, at:at + size].view(f"V{size}")[:, 0]


def _word(b: Bytes, at: int, dtype: type = np.uint32) -> np.ndarray:
    """The little-endian word at byte `at` of every block [count]."""
    return b[:, at:at + np.dtype(dtype).itemsize].view(dtype)[:, 0].copy()


def _half(b: Bytes, at: int) -> Tensor:
    """The F16 at byte `at` as F32 [count, 1]."""
    return torch.from_numpy(_word(b, at, np.uint16).view(np.float16)).float().unsqueeze(1)


def _bytes_of(*words: np.ndarray) -> Tensor:
    """Words U32 [count] each -> their bytes U8 [count, 4 of each]."""
    return torch.from_numpy(np.stack(words, 1).view(np.uint8))


def _nibbles(b: Bytes, at: int, size: int, run: int) -> Bytes:
    """Codes in `size` bytes: for every `run` of them the low nibbles, then the high ones."""
    made = np.empty((len(b), 2 * size), np.uint8)
    for high in range(2):
        part = _moved(b, 4 * high, 15)
        for first in range(0, size, run):
            _run(made, 2 * first + high * run, run)[:] = _run(part, at + first, run)
    return made


def _twos(b: Bytes, at: int, to: int = 0) -> Bytes:
    """Codes of two bits in 64 bytes: for each half of them four runs of 32, the lowest bits first; from bit `to` on."""
    made = np.empty((len(b), 256), np.uint8)
    data = _alone(b, at, 64)
    for i in range(4):
        part = _moved(data, 2 * i - to, 3 << to)
        for half in range(2):
            _run(made, 128 * half + 32 * i, 32)[:] = _run(part, 32 * half, 32)
    return made


def _ones(b: Bytes, at: int, to: int) -> Bytes:
    """Bits in 32 bytes: eight runs of 32, the lowest bits first; at bit `to`."""
    made = np.empty((len(b), 256), np.uint8)
    data = _alone(b, at, 32)
    for i in range(8):
        _run(made, 32 * i, 32)[:] = _run(_moved(data, i - to, 1 << to), 0, 32)
    return made


def _alone(b: Bytes, at: int, size: int) -> Bytes:
    """Bytes of every block, without the others."""
    return _run(b, at, size).copy().view(np.uint8).reshape(-1, size)


@cache
def _spread(bits: int) -> Tensor:
    """The table of a byte's codes of 1 or 2 bits, in bit 4 of a byte each and above: I64 or I32 [256]."""
    found = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, bits) & (1 << bits) - 1
    return (found << 4).to(torch.uint8).view(torch.int64 if bits == 1 else torch.int32).flatten()


def _fifth(b: Bytes, at: int) -> Bytes:
    """The fifth bits of 32 codes, which are one word, where they belong."""
    data = torch.from_numpy(_word(b, at).view(np.uint8))
    return _spread(1).index_select(0, data.int()).numpy().view(np.uint8).reshape(-1, 32)


def _less(codes: Bytes, middle: int) -> Bytes:
    """Codes less a number, I8."""
    signed = codes.view(np.int8)
    signed -= middle
    return signed


def _or(codes: Bytes, others: Bytes) -> Bytes:
    codes |= others
    return codes


def _one(b: Bytes, at: int = 0, low: int | None = None) -> Scales:
    """One F16 a block, and another that is added."""
    return _half(b, at), None if low is None else -_half(b, low)


def _six_bits(b: Bytes) -> Scales:
    """d, dmin and eight 6-bit scales and minima in 12 bytes, multiplied."""
    first, second, mixed = (_word(b, at) for at in (4, 8, 12))
    scales = _bytes_of(first & 0x3F3F3F3F, mixed & 0x0F0F0F0F | first >> 2 & 0x30303030)
    minima = _bytes_of(second & 0x3F3F3F3F, mixed >> 4 & 0x0F0F0F0F | second >> 2 & 0x30303030)
    return _half(b, 0) * scales.float(), _half(b, 2) * minima.float()


def _of_q2_k(b: Bytes) -> Scales:
    scales = torch.from_numpy(_alone(b, 0, 16))
    return _half(b, 80) * (scales & 15).float(), _half(b, 82) * (scales >> 4).float()


def _of_q3_k(b: Bytes) -> Scales:
    first, second, high = (_word(b, at) for at in (96, 100, 104))
    low = (first, second, first >> 4, second >> 4)
    scales = _bytes_of(*(word & 0x0F0F0F0F | (high >> 2 * i & 0x03030303) << 4 for i, word in enumerate(low)))
    return _half(b, 108) * (scales.view(torch.int8) - 32).float(), None


def _of_q6_k(b: Bytes) -> Scales:
    return _half(b, 208) * torch.from_numpy(_alone(b, 192, 16).view(np.int8)).float(), None


def _of_iq4_xs(b: Bytes) -> Scales:
    low, scales = _word(b, 4), np.empty((len(b) * 4, 2), np.uint8)
    scales[:, 0], scales[:, 1] = ((low >> shift & 0x0F0F0F0F).view(np.uint8) for shift in (0, 4))
    high = _spread(2).index_select(0, torch.from_numpy(_word(b, 2, np.uint16).view(np.uint8)).int())
    whole = torch.from_numpy(scales).view(-1, 8) | high.view(torch.uint8).view(-1, 8)
    return _half(b, 0) * (whole.view(torch.int8) - 32).float(), None


def _of_bytes(b: Bytes, means: Callable[[Tensor], Tensor], count: int) -> Scales:
    """The first bytes of blocks as what they mean."""
    return _meant(means).index_select(0, torch.from_numpy(b[:, :count].flatten()).int()).view(-1, count), None


@cache
def _meant(means: Callable[[Tensor], Tensor]) -> Tensor:
    return means(torch.arange(256, dtype=torch.uint8))


def _ternary(b: Bytes) -> Bytes:
    """Five digits a byte: of 32 bytes, of 16 bytes, and four of 4 bytes."""
    made = np.empty((len(b), 256), np.uint8)
    for i in range(5):
        digits = ((b * np.uint8(3 ** i)).astype(np.uint16) * 3 >> 8).astype(np.uint8)
        _run(made, 32 * i, 32)[:] = _run(digits, 0, 32)
        _run(made, 160 + 16 * i, 16)[:] = _run(digits, 32, 16)
        if i < 4:
            _run(made, 240 + 4 * i, 4)[:] = _run(digits, 48, 4)
    return _less(made, 1)


RULES = {
    "Q4_0": Rule(lambda b: _less(_nibbles(b, 2, 16, 16), 8), _one),
    "Q4_1": Rule(lambda b: _nibbles(b, 4, 16, 16), partial(_one, low=2)),
    "Q5_0": Rule(lambda b: _less(_or(_nibbles(b, 6, 16, 16), _fifth(b, 2)), 16), _one),
    "Q5_1": Rule(lambda b: _or(_nibbles(b, 8, 16, 16), _fifth(b, 4)), partial(_one, low=2)),
    "Q8_0": Rule(lambda b: b[:, 2:].view(np.int8), _one),
    "Q2_K": Rule(lambda b: _twos(b, 16), _of_q2_k),
    "Q3_K": Rule(lambda b: _less(_or(_ones(b, 0, to=2), _twos(b, 32)), 4), _of_q3_k),
    "Q4_K": Rule(lambda b: _nibbles(b, 16, 128, 32), _six_bits),
    "Q5_K": Rule(lambda b: _or(_ones(b, 16, to=4), _nibbles(b, 48, 128, 32)), _six_bits),
    "Q6_K": Rule(lambda b: _less(_or(_twos(b, 128, to=4), _nibbles(b, 0, 128, 64)), 32), _of_q6_k),
    "IQ4_NL": Rule(lambda b: _nibbles(b, 2, 16, 16), _one, blocks.NONLINEAR),
    "IQ4_XS": Rule(lambda b: _nibbles(b, 8, 128, 16), _of_iq4_xs, blocks.NONLINEAR),
    "TQ1_0": Rule(_ternary, partial(_one, at=52)),
    "TQ2_0": Rule(lambda b: _less(_twos(b, 0), 1), partial(_one, at=64)),
    "MXFP4": Rule(lambda b: _nibbles(b, 1, 16, 16), partial(_of_bytes, means=blocks.half_e8m0, count=1),
                  blocks.E2M1_DOUBLED),
    "NVFP4": Rule(lambda b: _nibbles(b, 4, 32, 8), partial(_of_bytes, means=blocks.half_e4m3, count=4),
                  blocks.E2M1_DOUBLED)}

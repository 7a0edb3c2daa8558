"""ggml's blocks -> numbers, in plain torch on any device: F32, bit for bit those of gguf-py's quants.py.

Each function takes blocks U8 [count, bytes of a block] and gives F32 [count, values of a block]. Scales become F32
before anything is multiplied, and nothing is rounded here. How bits lie in a block is said where they are taken out;
low nibbles are the first half of their values and high ones the second, not pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


def half(blocks: Tensor, at: int) -> Tensor:
    """The F16 at byte `at` as F32 [count, 1]."""
    return blocks[:, at:at + 2].contiguous().view(torch.float16).float()


@lru_cache(maxsize=64)
def constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on a device, made once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def bits(fields: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Integers [count, groups, n] -> [count, groups, shifts, n]: what lies at each shift, all low ones first."""
    table = constant(shifts, fields.dtype, fields.device)
    return (fields.unsqueeze(-2) >> table[:, None]) & mask


def looked_up(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    """Codes -> F32 of a table of 16 values."""
    table = constant(values, torch.float32, codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [count, n] as little-endian I32, of int16 or int32 words."""
    made = data.contiguous().view(dtype).int()
    return made & 0xFFFF if dtype == torch.int16 else made


def q4_0(b: Tensor) -> Tensor:
    return half(b, 0) * (_nibbles(b[:, 2:]).to(torch.int8) - 8).float()


def q4_1(b: Tensor) -> Tensor:
    return half(b, 0) * _nibbles(b[:, 4:]).float() + half(b, 2)


def q5_0(b: Tensor) -> Tensor:
    return half(b, 0) * (_fifth(b[:, 2:6], b[:, 6:]).to(torch.int8) - 16).float()


def q5_1(b: Tensor) -> Tensor:
    return half(b, 0) * _fifth(b[:, 4:8], b[:, 8:]).float() + half(b, 2)


def q8_0(b: Tensor) -> Tensor:
    return half(b, 0) * b[:, 2:].view(torch.int8).float()


def q2_k(b: Tensor) -> Tensor:
    """16 bytes of scales (low nibble) and minima (high), 64 of codes, d, dmin."""
    scales = b[:, :16]
    d, low = half(b, 80) * (scales & 15).float(), half(b, 82) * (scales >> 4).float()
    codes = bits(b[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).float()
    return (d.unsqueeze(-1) * codes - low.unsqueeze(-1)).flatten(1)


def q3_k(b: Tensor) -> Tensor:
    """32 bytes of high bits, 64 of low pairs, 12 of scales (8 of low nibbles, 4 of high pairs), d."""
    low = bits(b[:, 96:104].reshape(-1, 1, 8), (0, 4), 15).reshape(-1, 16)
    high = bits(b[:, 104:108].reshape(-1, 1, 4), (0, 2, 4, 6), 3).reshape(-1, 16)
    d = half(b, 108) * ((low | high << 4).to(torch.int8) - 32).float()
    codes = bits(b[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).to(torch.int8)
    unset = bits(b[:, :32].reshape(-1, 1, 32), tuple(range(8)), 1).reshape(-1, 16, 16).to(torch.int8) ^ 1
    return (d.unsqueeze(-1) * (codes - (unset << 2)).float()).flatten(1)


def q4_k(b: Tensor) -> Tensor:
    d, low = _scales_and_minima(b)
    codes = bits(b[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32).float()
    return (d.unsqueeze(-1) * codes - low.unsqueeze(-1)).flatten(1)


def q5_k(b: Tensor) -> Tensor:
    d, low = _scales_and_minima(b)
    codes = bits(b[:, 48:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    fifth = bits(b[:, 16:48].reshape(-1, 1, 32), tuple(range(8)), 1).reshape(-1, 8, 32)
    return (d.unsqueeze(-1) * (codes | fifth << 4).float() - low.unsqueeze(-1)).flatten(1)


def q6_k(b: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of high pairs, 16 I8 scales, d."""
    d = half(b, 208) * b[:, 192:208].view(torch.int8).float()
    low = bits(b[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = bits(b[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    codes = (low | high << 4).to(torch.int8) - 32
    return (d.unsqueeze(-1) * codes.reshape(-1, 16, 16).float()).flatten(1)


def iq4_nl(b: Tensor) -> Tensor:
    return half(b, 0) * looked_up(_nibbles(b[:, 2:]), NONLINEAR)


def iq4_xs(b: Tensor) -> Tensor:
    """d, 8 high pairs of scales in a word, 8 low nibbles, 128 bytes of codes."""
    high = bits(words(b[:, 2:4], torch.int16).unsqueeze(1), tuple(range(0, 16, 2)), 3).reshape(-1, 8)
    low = ((b[:, 4:8].unsqueeze(-1) >> constant((0, 4), torch.uint8, b.device)) & 15).reshape(-1, 8)  # in pairs
    d = half(b, 0) * ((low.int() | high << 4) - 32).float()
    codes = bits(b[:, 8:].reshape(-1, 8, 16), (0, 4), 15).reshape(-1, 8, 32)
    return (d.unsqueeze(-1) * looked_up(codes, NONLINEAR)).flatten(1)


def tq1_0(b: Tensor) -> Tensor:
    """Five ternary digits a byte: 32 bytes, 16 bytes, and 4 bytes of four digits; d."""
    def digits(data: Tensor, count: int) -> Tensor:
        powers = constant((1, 3, 9, 27, 81)[:count], torch.uint8, b.device)
        return (data.unsqueeze(-2) * powers[:, None]).flatten(1)  # modulo 256, which is how they are stored

    all_of = torch.cat([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], 1)
    return half(b, 52) * ((all_of.int() * 3 >> 8) - 1).float()


def tq2_0(b: Tensor) -> Tensor:
    codes = bits(b[:, :64].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    return half(b, 64) * (codes.to(torch.int8) - 1).float()


def mxfp4(b: Tensor) -> Tensor:
    return half_e8m0(b[:, :1]) * looked_up(_nibbles(b[:, 1:]), E2M1_DOUBLED)


def half_e8m0(byte: Tensor) -> Tensor:
    """An E8M0 scale, halved as the table is doubled; the lowest two are subnormal numbers."""
    e = byte.int()
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def nvfp4(b: Tensor) -> Tensor:
    """Four scales and 4 times 16 codes."""
    d = half_e4m3(b[:, :4])
    codes = bits(b[:, 4:].reshape(-1, 4, 8), (0, 4), 15).reshape(-1, 4, 16)
    return (d.unsqueeze(-1) * looked_up(codes, E2M1_DOUBLED)).flatten(1)


def half_e4m3(scale: Tensor) -> Tensor:
    """An unsigned E4M3 scale (0x7F, its NaN, is nothing), halved."""
    bad, known = scale & 127 == 127, (scale & 127).view(torch.float8_e4m3fn).float()
    return torch.where(bad, torch.where(scale == 127, 0.0, 480.0), known) * 0.5


def _nibbles(data: Tensor) -> Tensor:
    return bits(data.unsqueeze(1), (0, 4), 15).flatten(1)


def _fifth(high: Tensor, low: Tensor) -> Tensor:
    """Nibbles with their fifth bits, which are one word."""
    word = words(high, torch.int32)
    fifth = (word >> constant(tuple(range(32)), torch.int32, high.device)) & 1
    return _nibbles(low) | (fifth << 4).to(torch.uint8)


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """d, dmin and eight 6-bit scales and minima in 12 bytes: F32 [count, 8] each, multiplied."""
    first, second, mixed = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (mixed & 15) | (first >> 2) & 48], 1)
    minima = torch.cat([second & 63, (mixed >> 4) | (second >> 2) & 48], 1)
    return half(b, 0) * scales.float(), half(b, 2) * minima.float()


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k,
    "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "TQ1_0": tq1_0, "TQ2_0": tq2_0, "MXFP4": mxfp4,
    "NVFP4": nvfp4}

"""Small floats by their bits, and bytes that hold several codes, in Triton. Nothing here is rounded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(byte):
    """U8 -> F32. The bits are those of F32, whose exponents count from 2^-126 instead of 2^-6."""
    bits = byte.to(tl.int32)
    value = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0 ** 120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e5m2(byte):
    """U8 -> F32: the upper byte of F16."""
    return (byte.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e8m0(byte):
    """U8 -> F32 2^(byte - 127), of which 2^-127 is a subnormal number; 255 is NaN."""
    bits = byte.to(tl.int32)
    value = tl.where(bits == 0, 0x00400000, bits << 23)
    return tl.where(bits == 255, 0x7FC00000, value).to(tl.float32, bitcast=True)


@triton.jit
def e2m1(code):
    """I32 0..15 -> F32, by F32's bits as e4m3."""
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 2.0 ** 126


@triton.jit
def of_table(table, code):
    """F32 [16], I32 0..15 -> F32, by what is picked from numbers in registers: loads would be looked ahead for, and
    take all of them."""
    odd, second = (code & 1) != 0, (code & 2) != 0
    low = tl.where((code & 4) != 0, _of_four(table + 4, odd, second), _of_four(table, odd, second))
    high = tl.where((code & 4) != 0, _of_four(table + 12, odd, second), _of_four(table + 8, odd, second))
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def _of_four(table, odd, second):
    low = tl.where(odd, tl.load(table + 1), tl.load(table))
    return tl.where(second, tl.where(odd, tl.load(table + 3), tl.load(table + 2)), low)


@triton.jit
def byte_at(base, at, inside):
    """U8 -> I32."""
    return tl.load(base + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def half_at(base, at, inside):
    """F16 at any byte -> F32."""
    both = byte_at(base, at, inside) | (byte_at(base, at + 1, inside) << 8)
    return both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pairs(codes, row, column, K, rows, HIGH_FIRST: tl.constexpr, WHOLE: tl.constexpr, BC: tl.constexpr):
    """Two codes a byte -> I32 [BR, BC]; `row` [BR, 1] is where rows begin, `rows` [BR, 1] whether they are there."""
    at = column // 2 + tl.arange(0, BC // 2)
    inside = rows if WHOLE else rows & (at < K // 2)[None, :]
    byte = tl.load(codes + row + at[None, :], mask=inside, other=0).to(tl.int32)
    low, high = byte & 15, byte >> 4
    return tl.interleave(high, low) if HIGH_FIRST else tl.interleave(low, high)


@triton.jit
def words(codes, first, column, N, K, CODE: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """GPTQ's and AWQ's words I32 -> codes in F32 [BR, BC], of rows from `first` on, a multiple of BR.
    Their rows are columns here (quant/codecs/words.py)."""
    if CODE == "awq4":  # row 8 j + i is in nibble i / 2, or 4 + i / 2 for odd i, of word j
        k, j, i = column + tl.arange(0, BC), first // 8 + tl.arange(0, BR // 8), tl.arange(0, 8)
        at, rows = k[None, :].to(tl.int64) * (N // 8) + j[:, None], (j < N // 8)[:, None]
        word = tl.load(codes + at, mask=rows if WHOLE else rows & (k < K)[None, :], other=0)
        shift = (i // 2 + i % 2 * 4) * 4
        return tl.reshape((tl.expand_dims(word, 1) >> shift[None, :, None]) & 15, (BR, BC)).to(tl.float32)
    else:
        PER: tl.constexpr = 8 if CODE == "gptq4" else 4
        MASK: tl.constexpr = 15 if CODE == "gptq4" else 255
        j = column // PER + tl.arange(0, BC // PER)
        n = first + tl.arange(0, BR)
        at, rows = j[None, :].to(tl.int64) * N + n[:, None], (n < N)[:, None]
        word = tl.load(codes + at, mask=rows if WHOLE else rows & (j < K // PER)[None, :], other=0)
        shift = tl.arange(0, PER) * (32 // PER)
        many = (tl.expand_dims(word, 2) >> shift[None, None, :]) & MASK
        return tl.reshape(many, (BR, BC)).to(tl.float32)


@triton.jit
def spread(values, BR: tl.constexpr, NG: tl.constexpr, BC: tl.constexpr):
    """A number for each of NG groups [BR, NG] -> for each of BC columns; one for all stays [BR, 1]."""
    if NG == BC or NG == 1:
        return values
    else:
        return tl.reshape(tl.broadcast_to(tl.expand_dims(values, 2), (BR, NG, BC // NG)), (BR, BC))

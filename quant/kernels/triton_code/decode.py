"""What bytes and scales of a tile mean, in Triton: `tile` gives F32 [BR, BC] of a weight, bit by bit what the codecs'
definitions give. Whoever multiplies or stores weights takes them from here.

Products and sums are rounded one by one (kernels are launched without fusing two of them), F32's subnormal numbers are
kept, and no F8 type is used, which GPUs before SM 8.9 do not have. What is in capitals is a constant of a kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import e2m1, e4m3, e5m2, e8m0, of_table, pairs, spread, words
from .ggml import added_to, codes_of, scale_of


@triton.jit
def tile(codes, scale, factor, zero, offset, group, channel, dual, mul, first, column, N, K,
         code_row, scale_row, scale_group, dual_row,
         CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, DIVIDE: tl.constexpr,
         BLOCK: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows [first, first + BR) and columns [column, column + BC) of a weight [N, K], F32 [BR, BC]; `first` is a
    multiple of BR, `column` of BC, and K, too, where WHOLE.

        ((code - zero) * scale + offset) * channel * dual * mul       or / mul, where DIVIDE

    `codes` are bytes in rows `code_row` apart, or GPTQ's and AWQ's words. `scale`, `zero` and `offset` are [rows,
    groups] with strides `scale_row` and `scale_group`, a group of GROUP columns each, or as `group` [K] says; `factor`
    is a scale of all, or the table of codes; `channel` [N]; `dual` [N, dual_row], one for 512 columns; `mul` [K]. All
    but the codes may be None. Of ggml's types (SCALE "block", or "shifted" where groups have something to add), `codes`
    have everything, in blocks of BLOCK values and SIZE bytes.
    """
    n = first + tl.arange(0, BR)
    rows = (n < N)[:, None]
    row = n.to(tl.int64)[:, None] * code_row
    k = column + tl.arange(0, BC)
    inside = rows if WHOLE else rows & (k < K)[None, :]
    NG: tl.constexpr = BC if group is not None or (GROUP % BC != 0 and BC % GROUP != 0) else \
        (BC // GROUP if GROUP < BC else 1)
    if group is not None:
        g = tl.load(group + k, mask=k < K, other=0)
        known = inside
    elif NG == BC:
        g = k // GROUP
        known = inside
    else:
        g = tl.multiple_of(column // GROUP, NG) + tl.arange(0, NG)
        known = rows if WHOLE else rows & (g * GROUP < K)[None, :]
    if SCALE == "block" or SCALE == "shifted":
        value = codes_of(codes, factor, row + (k // BLOCK * SIZE)[None, :], (k % BLOCK)[None, :],
                         inside, CODE)
        PER: tl.constexpr = BLOCK // GROUP
        at, j = row + (g // PER * SIZE)[None, :], (g % PER)[None, :]
        value *= spread(scale_of(codes, at, j, known, CODE), BR, NG, BC)
        if SCALE == "shifted":
            value += spread(added_to(codes, at, j, known, CODE), BR, NG, BC)
        return value
    else:
        value = _values(codes, factor, first, rows, row, column, N, K, CODE, WHOLE, BR, BC)
        at = n.to(tl.int64)[:, None] * scale_row + g[None, :] * scale_group
        if zero is not None:
            value -= spread(tl.load(zero + at, mask=known, other=0).to(tl.float32), BR, NG, BC)
        if SCALE == "tiles":  # E4M3 in tiles of 128 x 4, which are 512 bytes, `scale_row` / 4 of them in a row
            r, c = n[:, None], g[None, :]
            at = ((r // 128).to(tl.int64) * (scale_row // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            scales = tl.load(factor) * e4m3(tl.load(scale + at, mask=known, other=0))
        elif SCALE == "e8m0":
            scales = e8m0(tl.load(scale + at, mask=known, other=0))
        else:
            scales = tl.load(scale + at, mask=known, other=0).to(tl.float32)
        value *= spread(scales, BR, NG, BC)
        if offset is not None:
            value += spread(tl.load(offset + at, mask=known, other=0).to(tl.float32), BR, NG, BC)
        if channel is not None:
            value *= tl.load(channel + n, mask=n < N, other=0).to(tl.float32)[:, None]
        if dual is not None:
            at = n.to(tl.int64) * dual_row + column // 512  # BC columns have one
            value *= tl.load(dual + at, mask=n < N, other=0)[:, None]
        if mul is not None:
            factors = tl.load(mul + k, mask=k < K, other=1).to(tl.float32)[None, :]
            value = tl.div_rn(value, tl.broadcast_to(factors, (BR, BC))) if DIVIDE else value * factors
        return value


@triton.jit
def _values(codes, table, first, rows, row, column, N, K, CODE: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr,
            BC: tl.constexpr):
    """What codes mean without their scales, F32 [BR, BC]."""
    if CODE == "int4":
        return ((pairs(codes, row, column, K, rows, False, WHOLE, BC) ^ 8) - 8).to(tl.float32)
    elif CODE == "uint4":
        return pairs(codes, row, column, K, rows, False, WHOLE, BC).to(tl.float32)
    elif CODE == "e2m1":
        return e2m1(pairs(codes, row, column, K, rows, False, WHOLE, BC))
    elif CODE == "e2m1_high":
        return e2m1(pairs(codes, row, column, K, rows, True, WHOLE, BC))
    elif CODE == "table":
        return of_table(table, pairs(codes, row, column, K, rows, True, WHOLE, BC))
    elif CODE == "gptq4" or CODE == "gptq8" or CODE == "awq4":
        return words(codes, first, column, N, K, CODE, WHOLE, BR, BC)
    else:
        k = column + tl.arange(0, BC)
        byte = tl.load(codes + row + k[None, :], mask=rows if WHOLE else rows & (k < K)[None, :], other=0)
        if CODE == "e4m3":
            return e4m3(byte)
        elif CODE == "e5m2":
            return e5m2(byte)
        else:
            tl.static_assert(CODE == "byte")
            return byte.to(tl.float32)  # of I8 or U8

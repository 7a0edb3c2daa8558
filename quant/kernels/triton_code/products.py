"""The kernels: a weight decoded into memory, and its product with few rows of activations."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import tile


@triton.jit
def store(codes, scale, factor, zero, offset, group, channel, dual, mul, out, N, K,
          code_row, scale_row, scale_group, dual_row,
          CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, DIVIDE: tl.constexpr,
          BLOCK: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out [N, K], contiguous, in its own dtype. A program makes [BR, BC] of it."""
    first, column = tl.program_id(1) * BR, tl.program_id(0) * BC
    value = tile(codes, scale, factor, zero, offset, group, channel, dual, mul, first, column, N, K,
                 code_row, scale_row, scale_group, dual_row, CODE, SCALE, GROUP, DIVIDE, BLOCK, SIZE, WHOLE, BR, BC)
    n, k = first + tl.arange(0, BR), column + tl.arange(0, BC)
    at, rows = n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=rows if WHOLE else rows & (k < K)[None, :])


@triton.jit
def multiply(codes, scale, factor, zero, offset, group, channel, dual, mul, x, bias, out, M, N, K,
             code_row, scale_row, scale_group, dual_row, x_row,
             CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, DIVIDE: tl.constexpr,
             BLOCK: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
             BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr):
    """x [M, K] times the weight [N, K], rounded to x's dtype, summed in F32. A program makes [BM, BR] of a part of the
    sum, STEPS steps of BC columns, which are all there where WHOLE. out is [parts, M, N]: F32 without bias where there
    are several parts."""
    below = tl.cdiv(M, BM)  # programs that share rows of the weight are neighbours: its bytes stay in the L2 cache
    pid, part = tl.program_id(0), tl.program_id(1)
    m = pid % below * BM + tl.arange(0, BM)
    first = pid // below * BR
    n = first + tl.arange(0, BR)
    total = tl.zeros((BM, BR), tl.float32)
    for step in range(STEPS):
        column = (part * STEPS + step) * BC
        k = column + tl.arange(0, BC)
        inside = (m < M)[:, None] if WHOLE else (m < M)[:, None] & (k < K)[None, :]
        seen = tl.load(x + m.to(tl.int64)[:, None] * x_row + k[None, :], mask=inside, other=0)
        value = tile(codes, scale, factor, zero, offset, group, channel, dual, mul, first, column, N, K,
                     code_row, scale_row, scale_group, dual_row, CODE, SCALE, GROUP, DIVIDE, BLOCK, SIZE, WHOLE, BR, BC)
        total = tl.dot(seen, tl.trans(value.to(seen.dtype)), total)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    at = (part * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def add_up(parts, bias, out, M, N, PARTS: tl.constexpr, BN: tl.constexpr):
    """parts F32 [PARTS, M, N] -> their sum plus bias [N], in the dtype of out [M, N]; always in the same order."""
    m, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + (part * M + m).to(tl.int64) * N + n, mask=n < N, other=0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)

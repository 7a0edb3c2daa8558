"""ggml's blocks in Triton: how bits lie in them is said in quant/ggml/blocks.py, whose numbers these are, bit by bit.

`at` are the bytes at which blocks begin, `r` or `j` which value or group of the block is wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import byte_at, half_at, of_table


@triton.jit
def codes_of(codes, table, at, r, inside, CODE: tl.constexpr):
    """What values mean without scales, F32."""
    if CODE == "q8_0":
        return byte_at(codes, at + 2 + r, inside).to(tl.int8).to(tl.float32)
    elif CODE == "q4_0":
        return (_halves(codes, at + 2, r, inside) - 8).to(tl.float32)
    elif CODE == "q4_1":
        return _halves(codes, at + 4, r, inside).to(tl.float32)
    elif CODE == "q5_0":
        fifth = (byte_at(codes, at + 2 + r // 8, inside) >> (r % 8)) & 1
        return ((_halves(codes, at + 6, r, inside) | (fifth << 4)) - 16).to(tl.float32)
    elif CODE == "q5_1":
        fifth = (byte_at(codes, at + 4 + r // 8, inside) >> (r % 8)) & 1
        return (_halves(codes, at + 8, r, inside) | (fifth << 4)).to(tl.float32)
    elif CODE == "q2_k":
        return _quarters(codes, at + 16, r, inside).to(tl.float32)
    elif CODE == "q3_k":
        unset = ((byte_at(codes, at + r % 32, inside) >> (r // 32)) & 1) ^ 1
        return (_quarters(codes, at + 32, r, inside) - (unset << 2)).to(tl.float32)
    elif CODE == "q4_k":
        return _by_64(codes, at + 16, r, inside).to(tl.float32)
    elif CODE == "q5_k":
        fifth = (byte_at(codes, at + 16 + r % 32, inside) >> (r // 32)) & 1
        return (_by_64(codes, at + 48, r, inside) | (fifth << 4)).to(tl.float32)
    elif CODE == "q6_k":
        low = (byte_at(codes, at + r // 128 * 64 + r % 64, inside) >> (r % 128 // 64 * 4)) & 15
        return ((low | (_quarters(codes, at + 128, r, inside) << 4)) - 32).to(tl.float32)
    elif CODE == "iq4_nl":
        return of_table(table, _halves(codes, at + 2, r, inside))
    else:
        tl.static_assert(CODE == "iq4_xs")
        return of_table(table, _halves(codes, at + 8 + r // 32 * 16, r % 32, inside))


@triton.jit
def scale_of(codes, at, j, inside, CODE: tl.constexpr):
    """What values of a group are multiplied by, F32."""
    if CODE == "q2_k":
        return half_at(codes, at + 80, inside) * (byte_at(codes, at + j, inside) & 15).to(tl.float32)
    elif CODE == "q3_k":
        low = (byte_at(codes, at + 96 + j % 8, inside) >> (j // 8 * 4)) & 15
        high = (byte_at(codes, at + 104 + j % 4, inside) >> (j // 4 * 2)) & 3
        return half_at(codes, at + 108, inside) * ((low | (high << 4)) - 32).to(tl.float32)
    elif CODE == "q4_k" or CODE == "q5_k":
        return half_at(codes, at, inside) * _sixth(codes, at + 4, at + 12, j, inside, 0).to(tl.float32)
    elif CODE == "q6_k":
        return half_at(codes, at + 208, inside) * byte_at(codes, at + 192 + j, inside).to(tl.int8).to(tl.float32)
    elif CODE == "iq4_xs":
        high = (byte_at(codes, at + 2 + j // 4, inside) >> (j % 4 * 2)) & 3
        low = (byte_at(codes, at + 4 + j // 2, inside) >> (j % 2 * 4)) & 15
        return half_at(codes, at, inside) * ((low | (high << 4)) - 32).to(tl.float32)
    else:
        return half_at(codes, at, inside)


@triton.jit
def added_to(codes, at, j, inside, CODE: tl.constexpr):
    """What is added to values of a group behind that, F32; only of types that have it."""
    if CODE == "q4_1" or CODE == "q5_1":
        return half_at(codes, at + 2, inside)
    elif CODE == "q2_k":
        return -(half_at(codes, at + 82, inside) * (byte_at(codes, at + j, inside) >> 4).to(tl.float32))
    else:
        tl.static_assert(CODE == "q4_k" or CODE == "q5_k")
        return -(half_at(codes, at + 2, inside) * _sixth(codes, at + 8, at + 12, j, inside, 4).to(tl.float32))


@triton.jit
def _halves(codes, at, r, inside):
    """Of 32 codes in 16 bytes: the first half in low nibbles."""
    return (byte_at(codes, at + r % 16, inside) >> (r // 16 * 4)) & 15


@triton.jit
def _quarters(codes, at, r, inside):
    """Of 128 codes in 32 bytes: 32 at each of four shifts."""
    return (byte_at(codes, at + r // 128 * 32 + r % 32, inside) >> (r % 128 // 32 * 2)) & 3


@triton.jit
def _by_64(codes, at, r, inside):
    """Of 64 codes in 32 bytes: the first half in low nibbles."""
    return (byte_at(codes, at + r // 64 * 32 + r % 32, inside) >> (r % 64 // 32 * 4)) & 15


@triton.jit
def _sixth(codes, own, mixed, j, inside, SHIFT: tl.constexpr):
    """Six bits of group j of 8: of the first four in bytes of their own, whose upper two bits are the others'."""
    byte = byte_at(codes, own + j % 4, inside)
    late = ((byte_at(codes, mixed + j % 4, inside) >> SHIFT) & 15) | ((byte >> 2) & 48)
    return tl.where(j < 4, byte & 63, late)

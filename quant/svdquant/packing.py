"""Nunchaku's fragment packings ↔ natural order (specs/nunchaku.md section 3), moved in the widest whole units.

Every function takes the padded sizes (rows and columns multiples of 128, rank of 16) and is exact: bytes are moved,
never computed with. E4M3 goes through its U8 view, because some torch builds cannot permute it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Order(NamedTuple):
    """A packed order: the sizes of its axes are ("a" = size / unit) and the axes of the natural order among them."""

    inner: tuple[int, ...]
    natural: tuple[int, ...]


# The two leading axes are block counts; the comment names every axis in packed order, then the natural order.
_QWEIGHT = _Order((8, 8, 4, 2, 2), (0, 2, 5, 3, 1, 6, 4))  # bn kt n16 n8 quad nh kh | bn n16 nh n8, kt kh quad (int32)
_MICRO = _Order((8, 4, 4), (0, 4, 3, 2, 1))  # bn kt n8 n4 n32 | bn n32 n4 n8, kt (int32 = 4 scales)
_VECTOR = _Order((8, 4, 2), (1, 0, 2, 4, 3))  # bn g n16 n4 nh | g, bn n16 nh n4 (int32 = 2 channels)
_DOWN = _Order((8, 4, 2, 2, 2), (0, 5, 3, 6, 1, 4, 2))  # k16 r16 r8 k4 rh kh k2 | k16 kh k4 k2, r16 rh r8 (int16)
_UP = _Order((8, 4, 2, 2), (0, 4, 2, 1, 5, 3))  # n16 r16 n8 r4 nh rh | n16 nh n8, r16 rh r4 (int32 = 2 ranks)


def _permuted(lanes: Tensor, order: tuple[int, ...]) -> Tensor:
    """A contiguous copy with the axes in this order. On the CPU by numpy: four times as fast as torch on short axes."""
    if lanes.device.type != "cpu":
        return lanes.permute(order).contiguous()
    return torch.from_numpy(np.ascontiguousarray(lanes.numpy().transpose(order)))


def _unpack(tensor: Tensor, lane: torch.dtype, blocks: tuple[int, int], order: _Order,
            shape: tuple[int, int]) -> Tensor:
    lanes = tensor.contiguous().view(-1).view(lane).view(*blocks, *order.inner)
    return _permuted(lanes, order.natural).view(-1).view(tensor.dtype).view(shape)


def _pack(tensor: Tensor, lane: torch.dtype, blocks: tuple[int, int], order: _Order,
          shape: tuple[int, int]) -> Tensor:
    sizes = (*blocks, *order.inner)
    lanes = tensor.contiguous().view(-1).view(lane).view([sizes[axis] for axis in order.natural])
    back = tuple(order.natural.index(axis) for axis in range(len(sizes)))
    return _permuted(lanes, back).view(-1).view(tensor.dtype).view(shape)


def unpack_qweight(packed: Tensor) -> Tensor:
    """I8 [N, K/2] fragment order → U8 [N, K/2] natural order, even column in the low nibble."""
    n, half = packed.shape
    return _unpack(packed.view(torch.uint8), torch.int32, (n // 128, half // 32), _QWEIGHT, (n, half))


def pack_qweight(codes: Tensor) -> Tensor:
    """The inverse of `unpack_qweight`: U8 [N, K/2] → I8 [N, K/2]."""
    n, half = codes.shape
    return _pack(codes, torch.int32, (n // 128, half // 32), _QWEIGHT, (n, half)).view(torch.int8)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """E4M3 [K/16, N] fragment order → E4M3 [N, K/16] natural order."""
    groups, n = packed.shape
    out = _unpack(packed.view(torch.uint8), torch.int32, (n // 128, groups // 4), _MICRO, (n, groups))
    return out.view(packed.dtype)


def pack_micro_scales(scale: Tensor) -> Tensor:
    """The inverse of `unpack_micro_scales`: E4M3 [N, K/16] → [K/16, N]."""
    n, groups = scale.shape
    out = _pack(scale.view(torch.uint8), torch.int32, (n // 128, groups // 4), _MICRO, (groups, n))
    return out.view(scale.dtype)


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit [G, N] in memory order [N/128][G][128] → natural [G, N]."""
    groups, n = packed.shape
    return _unpack(packed, torch.int32, (n // 128, groups), _VECTOR, (groups, n))


def pack_scales(scale: Tensor) -> Tensor:
    """The inverse of `unpack_scales`: 16-bit [G, N] → [G, N]."""
    groups, n = scale.shape
    return _pack(scale, torch.int32, (n // 128, groups), _VECTOR, (groups, n))


def unpack_vector(packed: Tensor) -> Tensor:
    """16-bit [N] (bias, wcscales, smooth_factor) → natural order."""
    return unpack_scales(packed.view(1, -1)).view(-1)


def pack_vector(vector: Tensor) -> Tensor:
    """The inverse of `unpack_vector`."""
    return pack_scales(vector.view(1, -1)).view(-1)


def unpack_down(packed: Tensor) -> Tensor:
    """16-bit proj_down [K, R] → natural [K, R]."""
    k, r = packed.shape
    return _unpack(packed, torch.int16, (k // 16, r // 16), _DOWN, (k, r))


def pack_down(down: Tensor) -> Tensor:
    """The inverse of `unpack_down`."""
    k, r = down.shape
    return _pack(down, torch.int16, (k // 16, r // 16), _DOWN, (k, r))


def unpack_up(packed: Tensor) -> Tensor:
    """16-bit proj_up [N, R] → natural [N, R]."""
    n, r = packed.shape
    return _unpack(packed, torch.int32, (n // 16, r // 16), _UP, (n, r))


def pack_up(up: Tensor) -> Tensor:
    """The inverse of `unpack_up`."""
    n, r = up.shape
    return _pack(up, torch.int32, (n // 16, r // 16), _UP, (n, r))


_SWAPS = ((8, 0xFF00), (4, 0xF000F0))  # bytes 1 and 2, then nibbles 1 and 2 of each half


def _swap(words: Tensor, shift: int, mask: int) -> Tensor:
    """Int32 words with the bits of `mask` exchanged with those `shift` above them."""
    moved = words >> shift
    moved ^= words
    moved &= mask
    out = words ^ moved
    moved <<= shift
    out ^= moved
    return out


def unpack_awq(packed: Tensor, interleaved: int = 1) -> Tensor:
    """Int32 [N/4, K/2] → U8 [N, K/2]: uint4 codes in natural order, even column in the low nibble.

    A word holds nibbles 0..3 (8 columns apart) of an even column, then of the next; _SWAPS pairs the columns up.
    `interleaved` S: stored rows are [N/S, S] and come out as [S, N/S].
    """
    rows4, half = packed.shape
    # numpy's large arrays take huge pages, torch's do not: a tenth of the page faults.
    out = torch.from_numpy(np.empty((rows4 * 4, half), np.uint8)).to(packed.device)
    natural = out.view(interleaved, -1, half).transpose(0, 1)  # by stored row
    step = max(1, (1 << 17) // (half * interleaved)) * interleaved  # rows that stay in the cache through all passes
    for at in range(0, rows4, step):
        words = packed[at:at + step].contiguous()
        for shift, mask in _SWAPS:
            words = _swap(words, shift, mask)
        lanes = words.view(-1).view(torch.uint8).view(-1, half // 32, 4, 2, 4, 4)  # n4 k64 n k32 j i
        rows = _permuted(lanes, (0, 2, 1, 3, 5, 4)).view(-1, interleaved, half)
        first = at * 4 // interleaved
        natural[first:first + len(rows)] = rows
    return out


def pack_awq(codes: Tensor) -> Tensor:
    """The inverse of `unpack_awq`: U8 [N, K/2] → int32 [N/4, K/2]."""
    n, half = codes.shape
    lanes = codes.contiguous().view(n // 4, 4, half // 32, 2, 4, 4)  # n4 n k64 k32 i j
    words = _permuted(lanes, (0, 2, 1, 3, 5, 4)).view(-1).view(torch.int32)
    for shift, mask in reversed(_SWAPS):
        words = _swap(words, shift, mask)
    return words.view(n // 4, half)

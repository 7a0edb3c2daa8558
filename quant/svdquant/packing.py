"""Nunchaku's fragment packings <-> natural order (docs/sources/nunchaku.md, "Packing"), moved in the widest units.

Every function takes the padded sizes (rows and columns multiples of 128, rank of 16) and is exact: bytes are moved,
never computed with. E4M3 goes through its U8 view, because some torch builds cannot permute it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..blocks import CACHED, look_up


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
    """I8 [N, K/2] fragment order -> U8 [N, K/2] natural order, even column in the low nibble."""
    n, half = packed.shape
    if packed.device.type != "cpu":
        return _unpack(packed.view(torch.uint8), torch.int32, (n // 128, half // 32), _QWEIGHT, (n, half))
    # Words looked up where they lie: one pass, where permuting axes this short takes two slow ones. Near each other
    # first, where 128 rows are more than stays in a core's cache.
    tiles, count = half // 32, 8 if 128 * half <= CACHED else 2
    stored = packed.contiguous().numpy().view(np.int32).reshape(n // 128, tiles, 8, 128)  # bn kt n16
    natural, places = np.empty((n // 128, 8 // count, tiles * count * 128), np.int32), _places_of_rows(tiles, count)
    for some, out in zip(stored, natural, strict=True):
        for i in range(len(out)):
            near = np.ascontiguousarray(some[:, i * count:(i + 1) * count])
            look_up(near, places, out[i])
    return torch.from_numpy(natural.view(np.uint8).reshape(n, half))


@lru_cache(maxsize=8)
def _places_of_rows(tiles: int, count: int) -> np.ndarray:
    """Where the words of 16 * `count` rows of `tiles` tiles (64 columns each) lie in packed order, in natural order."""
    words = np.arange(tiles * count * 128).reshape(1, tiles, count, *_QWEIGHT.inner[1:])
    return words.transpose(_QWEIGHT.natural).reshape(-1)


def pack_qweight(codes: Tensor) -> Tensor:
    """The inverse of `unpack_qweight`: U8 [N, K/2] -> I8 [N, K/2]."""
    n, half = codes.shape
    return _pack(codes, torch.int32, (n // 128, half // 32), _QWEIGHT, (n, half)).view(torch.int8)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """E4M3 [K/16, N] fragment order -> E4M3 [N, K/16] natural order."""
    groups, n = packed.shape
    out = _unpack(packed.view(torch.uint8), torch.int32, (n // 128, groups // 4), _MICRO, (n, groups))
    return out.view(packed.dtype)


def pack_micro_scales(scale: Tensor) -> Tensor:
    """The inverse of `unpack_micro_scales`: E4M3 [N, K/16] -> [K/16, N]."""
    n, groups = scale.shape
    out = _pack(scale.view(torch.uint8), torch.int32, (n // 128, groups // 4), _MICRO, (groups, n))
    return out.view(scale.dtype)


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit [G, N] in memory order [N/128][G][128] -> natural [G, N]."""
    groups, n = packed.shape
    return _unpack(packed, torch.int32, (n // 128, groups), _VECTOR, (groups, n))


def pack_scales(scale: Tensor) -> Tensor:
    """The inverse of `unpack_scales`: 16-bit [G, N] -> [G, N]."""
    groups, n = scale.shape
    return _pack(scale, torch.int32, (n // 128, groups), _VECTOR, (groups, n))


def unpack_vector(packed: Tensor) -> Tensor:
    """16-bit [N] (bias, wcscales, smooth_factor) -> natural order."""
    return unpack_scales(packed.view(1, -1)).view(-1)


def pack_vector(vector: Tensor) -> Tensor:
    """The inverse of `unpack_vector`."""
    return pack_scales(vector.view(1, -1)).view(-1)


def unpack_down(packed: Tensor) -> Tensor:
    """16-bit proj_down [K, R] -> natural [K, R]."""
    k, r = packed.shape
    return _unpack(packed, torch.int16, (k // 16, r // 16), _DOWN, (k, r))


def pack_down(down: Tensor) -> Tensor:
    """The inverse of `unpack_down`."""
    k, r = down.shape
    return _pack(down, torch.int16, (k // 16, r // 16), _DOWN, (k, r))


def unpack_up(packed: Tensor) -> Tensor:
    """16-bit proj_up [N, R] -> natural [N, R]."""
    n, r = packed.shape
    return _unpack(packed, torch.int32, (n // 16, r // 16), _UP, (n, r))


def pack_up(up: Tensor) -> Tensor:
    """The inverse of `unpack_up`."""
    n, r = up.shape
    return _pack(up, torch.int32, (n // 16, r // 16), _UP, (n, r))


# A uint4 lies at index j2 j1 j0 i1 i0 (bits) of 16 bytes: column i * 8 + j of 32, which belongs at i1 i0 j2 j1 j0. Of
# four words, told apart by the first two bits, two at a time exchange one bit of their number with one of the other
# three: j2 with j0, that with i0, and j1 with i1. Then they are numbered by i0 and i1.
_SWAPS = ((0, 16, 0x0000FFFF), (0, 4, 0x0F0F0F0F), (1, 8, 0x00FF00FF))


def _swap(words: np.ndarray, moved: np.ndarray, bit: int, shift: int, mask: int) -> None:
    """In words U32 [2, 2, ...], exchange in place the bits `mask` << `shift` of those whose `bit` of their number (0 is
    the first) is 0 with the bits `mask` of those where it is 1; `moved` is working memory for half of them."""
    low, high = words.swapaxes(0, bit)
    np.right_shift(low, np.uint32(shift), out=moved)
    moved ^= high
    moved &= np.uint32(mask)
    high ^= moved
    moved <<= np.uint32(shift)
    low ^= moved


def unpack_awq(packed: Tensor, interleaved: int = 1) -> Tensor:
    """Int32 [N/4, K/2] -> U8 [N, K/2]: uint4 codes in natural order, even column in the low nibble.

    `interleaved` S: stored rows are [N/S, S] and come out as [S, N/S].
    """
    rows4, half = packed.shape
    units = half // 16  # of 16 bytes a row
    stored = packed.contiguous().cpu().numpy().view(np.uint32).reshape(rows4, -1)
    out = np.empty((rows4 * 4, half), np.uint8)
    natural = out.view(np.uint32).reshape(interleaved, -1, units, 4).swapaxes(0, 1)  # by stored row
    step = max(1, CACHED // (half * 4 * interleaved)) * interleaved
    for at in range(0, rows4, step):
        lanes = stored[at:at + step]
        if not at or len(lanes) < step:
            words = np.arange(lanes.size).reshape(-1, half // 32, 4, 2, 4)  # n4 k64 n k32 word | word n4 n k64 k32
            places = words.transpose(4, 0, 2, 1, 3).reshape(-1)
            planes = np.empty((2, 2, lanes.size // 4), np.uint32)
            moved = np.empty_like(planes[0])
        look_up(lanes, places, planes)
        for swap in _SWAPS:
            _swap(planes, moved, *swap)
        first = at * 4 // interleaved
        into = natural[first:first + len(lanes) * 4 // interleaved]
        for word in range(4):
            into[..., word] = planes[word & 1, word >> 1].reshape(-1, interleaved, units)
    return torch.from_numpy(out).to(packed.device)


def pack_awq(codes: Tensor) -> Tensor:
    """The inverse of `unpack_awq`: U8 [N, K/2] -> int32 [N/4, K/2]."""
    n, half = codes.shape
    words = codes.contiguous().cpu().numpy().view(np.uint32).reshape(-1, 2, 2).transpose(2, 1, 0)  # i1 i0 | i0 i1
    planes = np.ascontiguousarray(words)
    moved = np.empty_like(planes[0])
    for swap in reversed(_SWAPS):
        _swap(planes, moved, *swap)
    lanes = planes.reshape(4, n // 4, 4, half // 32, 2).transpose(1, 3, 2, 4, 0)
    return torch.from_numpy(lanes.reshape(-1).view(np.int32).reshape(n // 4, half)).to(codes.device)

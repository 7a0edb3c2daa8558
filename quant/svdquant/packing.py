"""Nunchaku's fragment packings <-> natural order (docs/sources/nunchaku.md, "Packing"), moved in the widest units.

Every function takes the padded sizes (rows and columns multiples of 128, rank of 16) and is exact: bytes are moved,
never computed with. E4M3 goes through its U8 view, because some torch builds cannot permute it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_CACHED = 1 << 18  # bytes that stay in a core's cache through several passes; torch takes no second thread for them


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
    # The same in two passes, up to twice as fast: words that are 16 bytes apart come together, then 16 bytes (a complex
    # number is copied as its bits) go where they belong.
    stored = packed.contiguous().view(-1).view(torch.int32).numpy().reshape(n // 128, half // 32, 8, 32, 2, 2)
    out = np.empty((n // 128, 8, 2, 8, half // 32, 2), np.complex128)  # bn n16 nh n8 kt kh
    step = max(1, _CACHED // (128 * half))
    working = np.empty((step, half // 32, 8, 8), np.complex128)  # bn kt n16 n8
    for at in range(0, len(out), step):
        quads = working[:len(out) - at]
        for nh, kh in ((0, 0), (0, 1), (1, 0), (1, 1)):
            quads.view(np.int32)[:] = stored[at:at + step, ..., nh, kh]
            out[at:at + step, :, nh, :, :, kh] = quads.transpose(0, 2, 3, 1)
    return torch.from_numpy(out.view(np.uint8).reshape(n, half))


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


def tile_micro_scales(scale: Tensor) -> Tensor:
    """E4M3 [N, K/16] natural order -> the host's 128 x 4 tiles, padded with zeros: [N up to 128, K/16 up to 4]. What
    `blocks.swizzle` does, several times as fast."""
    padding = (0, -scale.shape[1] % 4, 0, -len(scale) % 128)
    lanes = torch.nn.functional.pad(scale.view(torch.uint8), padding).contiguous()
    tiles = lanes.view(torch.int32).view(len(lanes) // 128, 4, 32, -1)  # bn n32 n kt | bn kt n n32 (int32 = 4 scales)
    return _permuted(tiles, (0, 3, 2, 1)).view(torch.uint8).view(lanes.shape).view(scale.dtype)


def swap_nibbles_(codes: Tensor) -> Tensor:
    """Exchange the two codes of every byte of U8 [N, K/2], in place; K is a multiple of 16."""
    for words in codes.view(-1).view(torch.int64).split(_CACHED // 8):
        high = words >> 4
        high &= 0x0F0F0F0F0F0F0F0F
        words &= 0x0F0F0F0F0F0F0F0F
        words <<= 4
        words |= high
    return codes


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


# A uint4 lies at index j2 j1 j0 i1 i0 (bits) of 16 bytes: column i * 8 + j of 32. It goes to index i1 i0 j2 j1 j0. The
# first bit is which of two planes of 8 bytes it is in: the first swap exchanges j2 and i1, the others stay in a plane.
_PLANES = (8, 0x00FF00FF00FF00FF)
_SWAPS = ((28, 0xF0F0F0F0), (8, 0x0000FF000000FF00), (4, 0x00F000F000F000F0))


def _swap(low: Tensor, high: Tensor, shift: int, mask: int, moved: Tensor) -> None:
    """Exchange, in place, the bits of `mask` in `low` with those `shift` above them in `high`, which may be the same;
    `moved` is working memory of their size."""
    torch.bitwise_right_shift(low, shift, out=moved)
    moved ^= high
    moved &= mask
    high ^= moved
    moved <<= shift
    low ^= moved


def unpack_awq(packed: Tensor, interleaved: int = 1) -> Tensor:
    """Int32 [N/4, K/2] -> U8 [N, K/2]: uint4 codes in natural order, even column in the low nibble.

    `interleaved` S: stored rows are [N/S, S] and come out as [S, N/S].
    """
    rows4, half = packed.shape
    units = half // 16  # of 16 bytes a row
    # numpy's large arrays take huge pages, torch's do not: a tenth of the page faults.
    out = torch.from_numpy(np.empty((rows4 * 4, half), np.uint8)).to(packed.device)
    natural = out.view(-1).view(torch.int64).view(interleaved, -1, units, 2).transpose(0, 1)  # by stored row
    step = max(1, _CACHED // (half * 4 * interleaved)) * interleaved
    working = torch.empty(2, 2, min(step, rows4) * 4, units, dtype=torch.int64, device=packed.device)
    for at in range(0, rows4, step):
        lanes = packed[at:at + step].contiguous().view(-1).view(torch.int64).view(-1, half // 32, 4, 2, 2)
        rows = len(lanes) * 4
        planes, moved = working[:, :, :rows]
        # n4 k64 n k32 plane | plane n4 n k64 k32
        planes.view(2, -1, 4, half // 32, 2).copy_(lanes.permute(4, 0, 2, 1, 3))
        _swap(planes[0], planes[1], *_PLANES, moved[0])
        for swap in _SWAPS:
            _swap(planes, planes, *swap, moved)
        first = at * 4 // interleaved
        natural[first:first + rows // interleaved] = planes.view(2, -1, interleaved, units).permute(1, 2, 3, 0)
    return out


def pack_awq(codes: Tensor) -> Tensor:
    """The inverse of `unpack_awq`: U8 [N, K/2] -> int32 [N/4, K/2]."""
    n, half = codes.shape
    planes = codes.contiguous().view(-1).view(torch.int64).view(-1, 2).t().contiguous()
    moved = torch.empty_like(planes)
    for swap in reversed(_SWAPS):
        _swap(planes, planes, *swap, moved)
    _swap(planes[0], planes[1], *_PLANES, moved[0])
    lanes = planes.view(2, n // 4, 4, half // 32, 2).permute(1, 3, 2, 4, 0)
    return lanes.reshape(-1).view(torch.int32).view(n // 4, half)

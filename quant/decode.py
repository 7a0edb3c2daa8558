"""Codes to F32 on a CPU, in a few passes over what its caches hold: bit by bit what comfy-kitchen's eager decoding and
the codecs' definitions give, and several times as fast (`python3 dev.py bench`).

Everything writes into rows that are there already, a few at a time. A third of what a decoded weight costs otherwise is
the memory that it comes into.

What was measured (one thread, 3072 x 3072, over a copy of F32 of that size): a table of pairs is looked up in 0.7 by
torch.index_select with I32 indices, in 1.1 by numpy.take (which makes I64 of them) and in 2.5 by an index in brackets;
shifts of I16 take twice a product's time; a scale for every block, as a view of the rows, costs what one for all costs.

All in one thread: torch shares operations of 32768 values and more among its threads, and each of these waits for the
last of them. That is 20 to 50 times slower where other processes want the cores, too. Larger ones are numpy's, which
has no threads, or are taken in pieces that stay in the nearest cache.
"""

from __future__ import annotations

from functools import cache
from itertools import repeat
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

VALUES = 1 << 18  # decoded at once: F32 of them stay in a processor's cache
ALONE = (1 << 15) - 64  # values that torch does not share among its threads (at::internal::GRAIN_SIZE)
# The bits of E4M3 as those of F16, whose exponents count from 2^-14 instead of 2^-6. F16 has subnormal numbers that
# processors convert at full speed; as F32's, they would cost 150 cycles each, or be taken for zero.
_SHIFT, _MASK, _FACTOR = 1 << 7, 0xBF80 - (1 << 16), 2.0 ** 8
_LARGEST = 2.0 ** 119  # a scale below it can take the factor
_LAST = 127 + 119  # E8M0's byte of that


def e4m3(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """F8_E4M3 [rows, columns] times an F32 scale of [], [rows, 1] or [rows, blocks of a row], into F32 `out`.

    A product by a power of two is exact, so bits * (scale * 2^8) is rounded as value * scale is. Rows with NaN, and
    scales that are too large for that, get the table of all codes.
    """
    largest = scale.abs().max() if scale.numel() > 1 else scale
    if scale.numel() and abs(float(largest)) < _LARGEST:
        _by_bits(codes, scale * _FACTOR, out)
    else:
        looked_up(codes.view(torch.uint8), _e4m3_table(), out, scale)


def mxfp8(codes: Tensor, byte: Tensor, out: Tensor) -> None:
    """F8_E4M3 [rows, columns] times 2^(byte - 127), U8 [rows, blocks of a row] (255 is NaN), into F32 `out`."""
    if byte.numel() and int(byte.numpy().max()) < _LAST:
        _by_bits(codes, _entries(_e8m0_table(True), byte), out)
    else:
        looked_up(codes.view(torch.uint8), _e4m3_table(), out, e8m0(byte))


def _by_bits(codes: Tensor, factors: Tensor, out: Tensor) -> None:
    """As e4m3, by scales with the factor, but for rows with codes 0x7F or 0xFF."""
    import numpy as np

    data, half = codes.view(torch.int8).numpy(), None
    for first, last in steps(*codes.shape):
        part, made = data[first:last], out[first:last]
        factor = factors[first:last] if factors.ndim else factors
        room = made.view(-1).view(torch.uint8).numpy()[:part.size].reshape(part.shape)
        if int(np.bitwise_and(part.view(np.uint8), 127, out=room).max(initial=0)) == 127:
            looked_up(codes[first:last].view(torch.uint8), _e4m3_table(), made, factor / _FACTOR)
            continue
        half = np.empty(part.shape, np.int16) if half is None else half[:last - first]
        np.multiply(part, _SHIFT, out=half, dtype=np.int16)
        np.bitwise_and(half, _MASK, out=half)
        times(made, factor, torch.from_numpy(half).view(torch.float16))


def steps(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last row of what is decoded at once: as many times as it takes, and equal numbers of rows."""
    most = max(VALUES // max(columns, 1), 1)
    count = max(-(-rows // most), 1)
    size = -(-rows // count)
    return ((first, min(first + size, rows)) for first in range(0, rows, max(size, 1)))


def e8m0(byte: Tensor) -> Tensor:
    """U8 E8M0 [rows, blocks] -> F32: 2^(byte - 127), also for 0; 255 is NaN."""
    return _entries(_e8m0_table(False), byte)


def scaled_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    """F8_E4M3 of any shape, not many of them, times an F32 scale of []: F32."""
    return _entries(_e4m3_table() * scale, codes.view(torch.uint8))


def _entries(table: Tensor, codes: Tensor) -> Tensor:
    import numpy as np

    return table.index_select(0, torch.from_numpy(codes.numpy().astype(np.int32)).view(-1)).view(codes.shape)


def times(values: Tensor, scale: Tensor, source: Tensor | None = None) -> None:
    """F32 values [rows, columns], or those of `source` in any dtype, times a scale of [], [rows, 1] or [rows, blocks of
    a row], into `values`."""
    size = values.numel() // scale.numel() if scale.ndim else 1
    factors, parts = _pieces(scale, 1, size) if scale.ndim else repeat(scale), _pieces(values.view(-1, size), size)
    if source is None:
        for part, factor in zip(parts, factors, strict=False):
            part.mul_(factor)
    else:
        for part, found, factor in zip(parts, _pieces(source, size), factors, strict=False):
            part.copy_(found).mul_(factor)


def each(act: Callable[[Tensor, Tensor], object], values: Tensor, beside: Tensor) -> None:
    """An operation in place on F32 values [rows, columns], with what is beside them: [columns], [rows, 1] or [rows,
    blocks of a row]."""
    size = values.numel() // beside.numel() if beside.ndim > 1 else values.shape[1]
    others = _pieces(beside, 1, size) if beside.ndim > 1 else repeat(beside)
    for part, other in zip(_pieces(values.view(-1, size), size), others, strict=False):
        act(part, other)


def converted(codes: Tensor, out: Tensor) -> None:
    """Codes of any dtype into F32 `out` of the same shape."""
    size = out.shape[1]
    for part, found in zip(_pieces(out.view(-1, size), size), _pieces(codes, size), strict=True):
        part.copy_(found)


def _pieces(values: Tensor, size: int, of: int = 0) -> Sequence[Tensor]:
    """Values as [any number, size] in pieces of `at_once` values, or of those beside them, which are `of` times as
    many."""
    rows = values.reshape(-1, size)
    return rows.split(max(at_once() // (of or size), 1))


def at_once() -> int:
    """How many values torch works on in this thread alone."""
    return VALUES if torch.get_num_threads() == 1 else ALONE


def looked_up(codes: Tensor, table: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """What codes U8 or I16 [rows, n] mean by a table: F32 numbers, or pairs of them as F64, into F32 `out`; times a
    scale of [], [rows, 1] or [rows, blocks of a row]. Codes of I16 are not negative."""
    import numpy as np

    data, index = codes.numpy(), None
    for first, last in steps(*out.shape):
        part = data[first:last]
        index = np.empty(part.shape, np.int32) if index is None else index[:last - first]
        index[:] = part
        torch.index_select(table, 0, torch.from_numpy(index).view(-1), out=out[first:last].view(table.dtype).view(-1))
        if scale is not None:
            times(out[first:last], scale[first:last] if scale.ndim else scale)


def _kept(values: Tensor) -> Tensor:
    """A table that outlives inference mode."""
    with torch.inference_mode(False):
        return values.clone()


@cache
def _e4m3_table() -> Tensor:
    return _kept(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


@cache
def _e8m0_table(with_factor: bool) -> Tensor:
    bits = torch.arange(256, dtype=torch.int32) << 23
    bits[0], bits[255] = 0x00400000, 0x7FC00000  # 2^-127 is a subnormal number
    found = bits.view(torch.float32)
    return _kept(found * _FACTOR if with_factor else found)


def pairs(values: Sequence[float], *, low_first: bool, byte: int = 4) -> Tensor:
    """The table of a byte's two 4-bit codes, for `looked_up`: `values` are what the 16 codes mean. With `byte` 8, that
    of a little-endian word whose two bytes hold a code each."""
    codes = torch.arange(16 << byte)
    meant = torch.tensor(values, dtype=torch.float32)
    halves = (meant[codes & 15], meant[codes >> byte])
    return _kept(torch.stack(halves if low_first else halves[::-1], 1).view(torch.float64).flatten())

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
FOLDED = 1 << 18  # values from which a scale is multiplied into the table of pairs instead of into them


def e4m3(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """F8_E4M3 [rows, columns] times an F32 scale of [], [rows, 1] or [rows, blocks of a row], into F32 `out`.

    Two codes at once: a table of all their pairs, 512 KB, is a third faster than their bits, and NaN is in it.
    """
    if codes.shape[1] % 2 or not codes.is_contiguous():
        looked_up(codes.view(torch.uint8), _e4m3_table(), out, scale)
        return
    words, table = codes.view(torch.uint16), _e4m3_pairs()
    if scale.ndim == 0 and out.numel() >= FOLDED:
        looked_up(words, (table.view(torch.float32) * scale).view(torch.float64), out)
    else:
        looked_up(words, table, out, scale)


def mxfp8(codes: Tensor, byte: Tensor, out: Tensor) -> None:
    """F8_E4M3 [rows, columns] times 2^(byte - 127), U8 [rows, blocks of a row] (255 is NaN), into F32 `out`."""
    e4m3(codes, e8m0(byte), out)


def of_rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Rows `first` to `last`; the tensor itself where these are all, as of every small layer."""
    return tensor if last - first == len(tensor) else tensor[first:last]


def steps(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last row of what is decoded at once: as many times as it takes, and equal numbers of rows."""
    most = max(VALUES // max(columns, 1), 1)
    count = max(-(-rows // most), 1)
    size = -(-rows // count)
    return ((first, min(first + size, rows)) for first in range(0, rows, max(size, 1)))


def e8m0(byte: Tensor) -> Tensor:
    """U8 E8M0 [rows, blocks] -> F32: 2^(byte - 127), also for 0; 255 is NaN."""
    return _entries(_e8m0_table(), byte)


def scaled_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    """F8_E4M3 of any shape, not many of them, times an F32 scale of []: F32."""
    return _entries(_e4m3_table() * scale, codes.view(torch.uint8))


def _entries(table: Tensor, codes: Tensor) -> Tensor:
    import numpy as np

    return table.index_select(0, torch.from_numpy(codes.numpy().astype(np.int32)).view(-1)).view(codes.shape)


def times(values: Tensor, scale: Tensor, source: Tensor | None = None) -> None:
    """F32 values [rows, columns], or those of `source` in any dtype, times a scale of [], [rows, 1] or [rows, blocks of
    a row], into `values`."""
    if source is None and values.numel() <= ALONE:  # in one piece
        values = values.unflatten(1, (scale.shape[1], -1)) if scale.ndim else values
        values.mul_(scale.unsqueeze(-1) if scale.ndim else scale)
        return
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
    """What codes U8, U16 or I16 [rows, n] mean by a table: F32 numbers, or pairs of them as F64, into F32 `out`; times
    a scale of [], [rows, 1] or [rows, blocks of a row]. Codes of I16 are not negative."""
    import numpy as np

    data, index = codes.numpy(), None
    if out.numel() <= ALONE:  # in one piece
        places = torch.from_numpy(data.astype(np.int32)).view(-1)
        torch.index_select(table, 0, places, out=out.view(table.dtype).view(-1))
        if scale is not None:
            times(out, scale)
        return
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
def _e4m3_pairs() -> Tensor:
    """Of a little-endian word, F64 [65536]."""
    one = _e4m3_table()
    return _kept(torch.stack([one.repeat(256), one.repeat_interleave(256)], 1).view(torch.float64).flatten())


@cache
def _e8m0_table() -> Tensor:
    bits = torch.arange(256, dtype=torch.int32) << 23
    bits[0], bits[255] = 0x00400000, 0x7FC00000  # 2^-127 is a subnormal number
    return _kept(bits.view(torch.float32))


def pairs(values: Sequence[float], *, low_first: bool, byte: int = 4) -> Tensor:
    """The table of a byte's two 4-bit codes, for `looked_up`: `values` are what the 16 codes mean. With `byte` 8, that
    of a little-endian word whose two bytes hold a code each."""
    codes = torch.arange(16 << byte)
    meant = torch.tensor(values, dtype=torch.float32)
    halves = (meant[codes & 15], meant[codes >> byte])
    return _kept(torch.stack(halves if low_first else halves[::-1], 1).view(torch.float64).flatten())

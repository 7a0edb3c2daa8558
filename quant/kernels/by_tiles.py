"""x times a dequantized weight on a CPU, a few hundred rows at a time: decoded into memory that is used again and stays
in the processor's cache, then multiplied. No layer is ever whole in F32, but small ones are multiplied at once, also
where they are several tiles.

Activations of 16 bit are multiplied in F32 where the processor has no units for them: faster there, and rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from ..codecs import codec
from ..memory import empty

if TYPE_CHECKING:
    from ..tile import Tile

Piece = tuple["Tile", int, int]  # rows of a tile: the first, and the one behind the last

STEP = 128  # rows of a tile at least, and in multiples of it: what block scales have in one tile of theirs
# Numbers of a tile of more rows: 6 MB. Every product is shared among torch's threads, which wait for each other: few of
# them, and large.
VALUES = 3 << 19
FEW = 128  # tokens that are multiplied faster transposed in memory (in 0.75 of the time at 64; in 1.3 of it at 1024)
_scratch = threading.local()


def takes(x: object) -> bool:
    """Whether a product with x is made here: on a CPU, and of a dtype that is computed in F32."""
    return is_plain(x) and (x.dtype == torch.float32
                            or x.dtype in (torch.bfloat16, torch.float16) and not has_units(x.dtype))


def is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether x is a plain tensor on the CPU of which nothing is to be traced or differentiated."""
    return type(x) is Tensor and x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling()


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies matrices of this 16-bit dtype faster than F32."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # an operation that this torch does not have
        return True


def linear(x: Tensor, tiles: Sequence[Tile], bias: Tensor | None) -> Tensor:
    """x [M, K] times tiles [any rows, K] one below the other, in their codecs' own order, plus bias [all rows], in x's
    dtype; without low-rank branches. Computed in F32."""
    rows, columns = sum(tile.place.rows for tile in tiles), x.shape[1]
    step = _step(columns)
    weight = _rows(min(step, rows), columns)
    if rows <= step:
        added = _decode([(tile, 0, tile.place.rows) for tile in tiles], weight)
        if bias is not None:
            added = bias.float() if added is None else added + bias.float()
        out = matmul(x.float(), weight, added)
        return out if out.dtype == x.dtype else out.to(x.dtype)
    wide, made = x.float().t(), x.new_empty(rows, len(x), dtype=torch.float32)
    wide, first = wide.contiguous() if len(x) <= FEW else wide, 0
    for pieces in _pieces(tiles, step):
        last = first + sum(end - start for _, start, end in pieces)
        part, out = weight[:last - first], made[first:last]
        shift = _decode(pieces, part)
        torch.mm(part, wide, out=out)
        if shift is not None:
            out += shift[:, None]
        first = last
    if bias is not None:
        made += bias[:, None]
    return made.t().contiguous().to(x.dtype)


def _pieces(tiles: Sequence[Tile], step: int) -> Iterator[list[Piece]]:
    """All rows of the tiles, `step` of them at a time."""
    found, room = list[Piece](), step
    for tile in tiles:
        first = 0
        while first < tile.place.rows:
            last = min(first + room, tile.place.rows)
            found.append((tile, first, last))
            room, first = room - (last - first), last
            if not room:
                yield found
                found, room = [], step
    if found:
        yield found


def _decode(pieces: Sequence[Piece], out: Tensor) -> Tensor | None:
    """Pieces one below the other into F32 `out`; what they add to the bias, F32 [rows], or None."""
    if len(pieces) == 1:
        tile, first, last = pieces[0]
        kind = codec(tile.place.codec)
        kind.decode_rows(tile, first, last, out)
        return kind.shift(out)
    shifts, parts = [], out.split([last - first for _, first, last in pieces])
    for (tile, first, last), part in zip(pieces, parts, strict=True):
        kind = codec(tile.place.codec)
        kind.decode_rows(tile, first, last, part)
        shifts.append(kind.shift(part))
    if all(shift is None for shift in shifts):
        return None
    return torch.cat([part.new_zeros(len(part)) if shift is None else shift
                      for shift, part in zip(shifts, parts, strict=True)])


def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for a weight [N, K] that is there in F32."""
    return matmul(x.float(), weight, bias if bias is None else bias.float()).to(x.dtype)


def decoded(tile: Tile) -> Tensor:
    """What `linear` multiplies by, F32 [N, K]."""
    if tile.place.codec == "plain":
        return tile["codes"]
    rows, columns, kind = tile.place.rows, tile.place.columns, codec(tile.place.codec)
    step, weight = _step(columns), empty((rows, columns), torch.float32)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        kind.decode_rows(tile, first, last, weight[first:last])
    return weight


def _step(columns: int) -> int:
    """Rows of a tile that are decoded at once."""
    return max(VALUES // columns // STEP * STEP, STEP)


def _rows(rows: int, columns: int) -> Tensor:
    """F32 [rows, columns] of this thread, used again. No inference tensor, which could be written in that mode only."""
    views: dict[tuple[int, int], Tensor] | None = getattr(_scratch, "views", None)
    found = None if views is None else views.get((rows, columns))  # nearly always: a model has few shapes of layers
    if found is not None:
        return found
    held = getattr(_scratch, "held", None)
    with torch.inference_mode(False):
        if views is None or held is None or held.numel() < rows * columns:
            held, views = torch.empty(rows * columns), {}
            _scratch.held, _scratch.views = held, views
        found = views[rows, columns] = held[:rows * columns].view(rows, columns)
    return found

"""x times a dequantized weight on a CPU, a few hundred rows at a time: decoded into memory that is used again and stays
in the processor's cache, then multiplied. No layer is ever whole in F32.

Activations of 16 bit are multiplied in F32 where the processor has no units for them: faster there, and rounded once.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from ..memory import empty

if TYPE_CHECKING:
    from ..codecs.base import Codec
    from ..tile import Tile

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


def linear(x: Tensor, kind: Codec, tile: Tile, bias: Tensor | None) -> Tensor:
    """x [M, K] times a tile [N, K] in its codec's own order, plus bias [N], in x's dtype; without its low-rank branch.
    Computed in F32."""
    rows, columns = tile.place.rows, tile.place.columns
    step = _step(columns)
    weight = _rows(min(step, rows), columns)
    if rows <= step:
        kind.decode_rows(tile, 0, rows, weight)
        added = kind.shift(weight)
        if bias is not None:
            added = bias.float() if added is None else added + bias.float()
        return matmul(x.float(), weight, added).to(x.dtype)
    wide, made = x.float().t(), x.new_empty(rows, len(x), dtype=torch.float32)
    wide = wide.contiguous() if len(x) <= FEW else wide
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part, out = weight[:last - first], made[first:last]
        kind.decode_rows(tile, first, last, part)
        torch.mm(part, wide, out=out)
        if (shift := kind.shift(part)) is not None:
            out += shift[:, None]
    if bias is not None:
        made += bias[:, None]
    return made.t().contiguous().to(x.dtype)


def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for a weight [N, K] that is there in F32."""
    return matmul(x.float(), weight, bias if bias is None else bias.float()).to(x.dtype)


def decoded(kind: Codec, tile: Tile) -> Tensor:
    """What `linear` multiplies by, F32 [N, K]."""
    if tile.place.codec == "plain":
        return tile["codes"]
    rows, columns = tile.place.rows, tile.place.columns
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
    held = getattr(_scratch, "held", None)
    if held is None or held.numel() < rows * columns:
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(rows * columns)
    return held[:rows * columns].view(rows, columns)

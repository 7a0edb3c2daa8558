"""Integers with a scale and a zero point for every group of columns as npu_weight_quant_batchmatmul takes them.

The operator multiplies x [M, K] by (weight + offset) * scale, in x's dtype, where weight is signed: I8 [K, N], or int4
as I32 [K, N / 8], the lowest bits first, which is what npu_convert_weight_to_int4pack makes of them. With codes from 0
on that is weight = code - middle and offset = middle - zero, whole numbers up to 128, so offsets are exact in BF16 and
F16; and scales are rounded to x's dtype. Its rules: docs/sources/ascend.md, "Weights alone".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...host.texts import Text
from ..tile import Tile
from . import mx

OP = "npu_weight_quant_batchmatmul"
ORDER = "torch_npu"
BITS = {"u4_groups": 4, "u8_groups": 8, "u4_gptq": 4, "u8_gptq": 8, "u4_awq": 4}  # codec -> bits of a code
LONGEST = 65535  # rows and columns
HALF_STEP = 2.0 ** -11  # what rounding to F16 changes at most, where F16 has its whole precision


def refusal(tile: Tile) -> str:
    """Why the operator does not take a tile in the codec's own order, in words; empty when it does."""
    rows, columns = tile.place.rows, tile.place.columns
    scale, zero = tile["scale"].float(), tile["zero"].float() if "zero" in tile.fields else None
    count = scale.numel() // rows
    size, left = divmod(columns, count)
    if "group" in tile.fields:
        return Text("columns in an order of their own")
    if "offset" in tile.fields:
        return Text("a float offset")
    if left or count > 1 and size % 32:
        return Text("groups of {size} columns, not of a multiple of 32", size=size)
    if BITS[tile.place.codec] == 4 and rows % 8:
        return Text("{rows} rows, not a multiple of 8", rows=rows)
    if max(rows, columns) > LONGEST:
        return Text("more than {most} rows or columns", most=LONGEST)
    top = 1 << BITS[tile.place.codec]
    if zero is not None and not bool(((zero == zero.round()) & (zero >= 0) & (zero <= top)).all()):
        return Text("zero points that are no codes")
    if not bool(((scale.half().float() - scale).abs() <= HALF_STEP * scale.abs()).all()):
        return Text("scales that F16 does not hold")
    return ""


def ordered(tile: Tile) -> Tile:
    """A tile of codec groups in the operator's order where it takes it, else as it is. Codes become I32
    [columns, rows / 8] or I8 [columns, rows], scale and zero [groups, rows]."""
    if tile.place.order or refusal(tile):
        return tile
    if BITS[tile.place.codec] == 4:
        codes = mx.pack(mx.unpack(tile["codes"]).t().contiguous() ^ 8).view(torch.int32)
    else:
        codes = (tile["codes"] ^ 128).view(torch.int8).t().contiguous()
    return _turned(tile, codes, ORDER)


def natural(tile: Tile) -> Tile:
    """The other way round."""
    if not tile.place.order:
        return tile
    if BITS[tile.place.codec] == 4:
        codes = mx.pack((mx.unpack(tile["codes"].contiguous()) ^ 8).t().contiguous())
    else:
        codes = tile["codes"].t().contiguous().view(torch.uint8) ^ 128
    return _turned(tile, codes, "")


def _turned(tile: Tile, codes: Tensor, order: str) -> Tile:
    turned = {name: tile[name].t().contiguous() for name in ("scale", "zero") if name in tile.fields}
    return Tile(tile.place._replace(order=order), {**tile.fields, "codes": codes, **turned})


def multiply(x: Tensor, tile: Tile, bias: Tensor | None) -> Tensor:
    """x [M, K], F16 or BF16, times a tile in the operator's order, plus bias [N]: [M, N] in x's dtype."""
    import torch_npu

    scale, zero, count = tile["scale"], tile.get("zero"), tile["scale"].shape[0]
    middle = float(1 << BITS[tile.place.codec] - 1)
    offset = torch.full_like(scale, middle) if zero is None else middle - zero
    if bias is not None:
        bias = bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype).contiguous()
    out: Tensor = torch_npu.npu_weight_quant_batchmatmul(
        x, tile["codes"], scale.to(x.dtype), offset.to(x.dtype), bias=bias,
        antiquant_group_size=tile.place.columns // count if count > 1 else 0)
    return out

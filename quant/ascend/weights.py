"""Weights of Ascend's kinds in plain torch: what the codes of a tile mean, and a patched weight coded again.

The fields of a tile: quant/codecs/ascend.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..blocks import linear_blocks, swizzle
from ..decode import converted, e4m3, e8m0, each, looked_up, mxfp8, of_rows, pairs, times
from ..layout_names import is_int8
from ..tile import Place, Tile
from . import integers, mx
from .kinds import BLOCK, DUAL_BLOCK, KINDS, LEVELS


def integer_codes(tile: Tile) -> Tensor:
    """The codes of an integer weight as I8 [rows, columns]."""
    return integers.unpack_int4(tile["codes"]) if KINDS[tile.place.codec].codec == "int4" else tile["codes"]


def decode(tile: Tile, *, smoothed: bool = True) -> Tensor:
    """The weight in F32 [rows, columns]; without the smoothing vector when not `smoothed`."""
    codec = KINDS[tile.place.codec].codec
    scale, mul = tile["scale"], tile.get("mul")
    if codec in ("int8", "int4"):
        scale = scale / tile["input_scale"] if "input_scale" in tile.fields else scale
        weight = integers.dequantize_rows(integer_codes(tile), scale, tile.get("offset"))
    elif codec == "e4m3":
        weight = tile["codes"].float() * scale
    elif codec == "mxfp8":
        weight = mx.dequantize(tile["codes"], scale)
    elif codec == "mxfp4":
        weight = mx.dequantize_fp4(tile["codes"], scale)
    else:
        weight = mx.dequantize_dual(tile["codes"], scale, tile["dual"])
    return weight if mul is None or not smoothed else weight * mul


def decode_rows(tile: Tile, first: int, last: int, out: Tensor) -> bool:
    """Rows of what `decode` gives, into F32 `out`, on a CPU; False for columns that are no whole blocks."""
    codec = KINDS[tile.place.codec].codec
    codes, scale, mul = of_rows(tile["codes"], first, last), of_rows(tile["scale"], first, last), tile.get("mul")
    if tile.place.columns % (DUAL_BLOCK if codec == "mxfp4_dual" else scale.shape[1]):
        return False
    if codec in ("int8", "int4"):
        scale = (scale / tile["input_scale"] if "input_scale" in tile.fields else scale).float()
        if codec == "int4":
            looked_up(codes, _int4_pairs(), out)
        elif "offset" in tile.fields:
            converted(codes, out)
        if "offset" in tile.fields:
            each(Tensor.sub_, out, of_rows(tile["offset"], first, last).float())
        times(out, scale, codes if codec == "int8" and "offset" not in tile.fields else None)
    elif codec == "e4m3":
        e4m3(codes, scale, out)
    elif codec == "mxfp8":
        mxfp8(codes, scale, out)
    else:
        looked_up(codes, _fp4_pairs(), out, e8m0(scale))
        if codec == "mxfp4_dual":
            times(out, of_rows(tile["dual"], first, last))
    if mul is not None:
        each(Tensor.mul_, out, mul)
    return True


@cache
def _int4_pairs() -> Any:
    return pairs(tuple(float(code - 16 * (code > 7)) for code in range(16)), low_first=True)


@cache
def _fp4_pairs() -> Any:
    return pairs((*mx.E2M1, *(-value for value in mx.E2M1)), low_first=True)


def _static_bias(codes: Tensor, scale: Tensor, like: Tile) -> dict[str, Tensor]:
    """deq_scale and quant_bias of "w8a8" for new codes and weight scales [rows, 1]; the layer's bias stays what the old
    quant_bias holds."""
    total = like["quant_bias"] + like["input_offset"] * like["codes"].sum(1, dtype=torch.float32)
    bias, deq = total * like["scale"][:, 0], scale * like["input_scale"]
    quant_bias = bias / deq[:, 0] - like["input_offset"] * codes.sum(1, dtype=torch.float32)
    return {"scale": deq, "quant_bias": quant_bias.round().to(torch.int32)}


def _tiny_blocks(codes: Tensor, scale: Tensor) -> bool:
    """Whether MXFP8 blocks with byte 0 have codes other than zero."""
    if not bool((scale == 0).any()):
        return False
    return bool(((scale == 0) & (mx.split(codes.float(), BLOCK) != 0).any(-1)).any())


def requantize(weight: Tensor, like: Tile, seed: int) -> Tile:
    """A float weight coded as `like` is. Scales come from the new weight; offsets become zero, as new codes are
    symmetric."""
    codec, activation = KINDS[like.place.codec]
    mul, weight = like.get("mul"), weight.float()
    if mul is not None:
        weight = weight / mul
    made: dict[str, Tensor] = {}
    if codec in ("int8", "int4"):
        codes, made["scale"] = integers.quantize_rows(weight, LEVELS[codec], like["scale"].shape[1], seed)
        if activation == "static":
            made |= _static_bias(codes, made["scale"], like)
        made["codes"] = mx.pack(codes) if codec == "int4" else codes
    elif codec == "e4m3":
        made["scale"] = (weight.abs().amax(1, keepdim=True) / mx.E4M3_MAX).clamp(min=1e-30)
        values = mx.dither(weight / made["scale"], 3, -6, seed)
        made["codes"] = values.clamp(-mx.E4M3_MAX, mx.E4M3_MAX).to(mx.E4M3)
    elif codec == "mxfp8":
        made["codes"], made["scale"] = mx.quantize(weight, seed)
    elif codec == "mxfp4":
        made["codes"], made["scale"] = mx.quantize_fp4(weight, seed=seed)
    else:
        made["codes"], made["scale"], made["dual"] = mx.quantize_dual(weight, seed)
    if "offset" in like.fields:
        made["offset"] = torch.zeros_like(like["offset"])
    return like.having(**made)


def for_host(codes: Tensor, scale: Tensor) -> dict[str, Tensor] | None:
    """MXFP8 as the host's layout has it: padded to 32 x 32, scales in tiles; None where its decoding differs."""
    if _tiny_blocks(codes, scale):  # the host decodes byte 0 as zero
        return None
    rows, columns = -codes.shape[0] % BLOCK, -codes.shape[1] % BLOCK
    if rows or columns:
        codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(mx.E4M3)
    return {"weight": codes, "weight_scale": swizzle(scale).view(torch.float8_e8m0fnu)}


def from_host(weight: Any, kind: str) -> Tile | None:
    """A weight in the host's INT8 or MXFP8 layout as a tile of `kind`, without padding; None for any other layout."""
    data, p = weight._qdata, weight._params
    rows, columns = p.orig_shape
    if KINDS[kind].codec == "int8" and is_int8(weight) and not p.convrot:
        return Tile(Place(kind, rows, columns),
                    {"codes": data, "scale": p.scale.float().reshape(-1, 1).expand(rows, 1).contiguous()})
    if KINDS[kind].codec == "mxfp8" and weight._layout_cls == "TensorCoreMXFP8Layout":
        scale = linear_blocks(p.scale.view(torch.uint8), rows, 8 * -(-columns // BLOCK))  # of eight bytes of NVFP4 each
        return Tile(Place(kind, rows, columns), {"codes": data[:rows, :columns], "scale": scale})
    return None

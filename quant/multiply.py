"""The forward of a weight in the tiled layout: every tile by its kernel, outputs on the same rows added, then bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, dequantize_args, register_layout_op
from torch import Tensor
from torch.nn.functional import linear as matmul

from .codecs import codec
from .exact import or_exact
from .kernels import by_tiles, kernel
from .kernels.base import Activation, dense_below
from .layouts.tiled import TilesLayout, is_tiled, tiles_of
from .tile import Place, Tile


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight of tiles, plus the stored bias [N]; in the dtype of x."""
    params = weight._params
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    act = Activation(flat)
    if len(params.tiles) == 1:
        out = by_kernel(params.kernels[0], act, tiles_of(weight)[0], None if bias is None else bias.to(x.dtype))
    else:
        tiles = sorted(zip(tiles_of(weight), params.kernels, strict=True), key=lambda one: one[0].place[3:5])
        if by_tiles.takes(flat) and all(not name and _is_decoded(tile, flat) for tile, name in tiles):
            out = dense_below(flat, [tile for tile, _ in tiles], bias)
        elif _in_bands([tile.place for tile, _ in tiles]):
            out = _in_order(act, tiles, bias)
        else:
            out = _anywhere(act, tiles, bias, params.orig_shape[0])
    if params.delta is not None:
        out = out + matmul(flat, params.delta.to(x.dtype))
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


def _is_decoded(tile: Tile, x: Tensor) -> bool:
    """Whether a tile is as wide as x [M, K], and not plain numbers already."""
    return tile.place.columns == x.shape[1] and tile.place.codec != "plain"


def _in_bands(places: list[Place]) -> bool:
    """Whether tiles that share a row share all of theirs."""
    heights: dict[int, int] = {}
    return all(heights.setdefault(p.row, p.rows) == p.rows for p in places) and \
        sum(heights.values()) == max(p.row + p.rows for p in places)


def _in_order(act: Activation, tiles: list[tuple[Tile, str]], bias: Tensor | None) -> Tensor:
    """The product of bands of tiles, one below the other."""
    made = dict[int, Tensor]()
    for tile, name in tiles:
        p = tile.place
        first = p.row not in made
        own_bias = bias[p.row:p.row + p.rows].to(act.x.dtype) if first and bias is not None else None
        out = by_kernel(name, act.columns(p.column, p.columns), tile, own_bias)
        made[p.row] = out if first else made[p.row] + out
    return next(iter(made.values())) if len(made) == 1 else torch.cat(list(made.values()), 1)


def _anywhere(act: Activation, tiles: list[tuple[Tile, str]], bias: Tensor | None, rows: int) -> Tensor:
    """The product where tiles beside each other begin and end at different rows."""
    out = act.x.new_zeros(act.x.shape[0], rows)
    for tile, name in tiles:
        p = tile.place
        out[:, p.row:p.row + p.rows] += by_kernel(name, act.columns(p.column, p.columns), tile, None)
    return out if bias is None else out + bias.to(out.dtype)


def by_kernel(name: str, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
    """One tile by the kernel of this name, and by the codec's definition where that refuses."""
    run = kernel(name)
    if not name:
        return run.linear(act, tile, bias)
    return or_exact(lambda: run.linear(act, tile, bias), lambda: run.exact(act, tile, bias),
                    f"{codec(tile.place.codec).title} by {run.title}")


@register_layout_op(torch.ops.aten.linear.default, TilesLayout)
def _linear(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not is_tiled(weight) or weight._params.transposed:
        return matmul(*dequantize_args((x, weight, bias)))
    return linear(x.dequantize() if isinstance(x, QuantizedTensor) else x, weight, bias)


# Outside inference mode (torch.compile, training) linear arrives taken apart: t, then mm or addmm.
@register_layout_op(torch.ops.aten.t.default, TilesLayout)
def _t(_qt: object, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = args[0]._params
    flipped = replace(params, orig_shape=tuple(reversed(params.orig_shape)), transposed=not params.transposed)
    return QuantizedTensor(args[0]._qdata, args[0]._layout_cls, flipped)


def _untransposed(x: Any, weight: Any) -> QuantizedTensor | None:
    """The weight W of x @ W.T, or None when this is no such product."""
    if isinstance(x, QuantizedTensor) or not is_tiled(weight) or not weight._params.transposed:
        return None
    return _t(None, (weight,), {})


@register_layout_op(torch.ops.aten.mm.default, TilesLayout)
def _mm(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    weight = _untransposed(*args[:2])
    return torch.mm(*dequantize_args(args)) if weight is None else linear(args[0], weight, None)


@register_layout_op(torch.ops.aten.addmm.default, TilesLayout)
def _addmm(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    weight = None if kwargs else _untransposed(*args[1:3])
    return torch.addmm(*dequantize_args(args), **kwargs) if weight is None else linear(args[1], weight, args[0])

"""What a Linear with patches beside its weight puts into a state_dict, and so into files.

Low-rank pairs go into the tiles' own low-rank branches, with the quantized bytes as they are (layouts/stored.py);
whatever else there is makes a plain layer in the compute dtype. Where a stored bias goes with the quantized weight
alone, that keeps its tiles and gets a `weight_delta`. None of it is computed before it is written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..layouts import host_tiles, stored
from ..layouts.tiled import is_tiled, parameter, params_of, shifts, tiles_of
from ..marker import marker
from ..tile import Tile
from .factors import added, appended, factors, low_rank, touches
from .loading import patches_of, pending
from .stand_ins import lazy

# What the names of a quantized weight's tensors begin with, in this pack's layout and in the host's.
PIECES = ("weight_scale", "weight_t", "weight_delta", "weight_s_", "weight_zeros", "weight_codebook")


def is_piece(key: str) -> bool:
    """Whether a patch is for a tensor beside the codes of a quantized weight: merges of ComfyUI's have such, and they
    do nothing."""
    leaf = key.rpartition(".")[2]
    return leaf in ("comfy_quant", "input_scale", "pre_quant_scale") or leaf.startswith(PIECES)


def state_of(module: Any, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves of a Linear with its patches: `own` are those without."""
    changes = module.changes()
    if changes is None:
        return own
    bias = {"bias": own["bias"]} if "bias" in own else {}
    if not isinstance(module.weight, QuantizedTensor):  # patches have made it dense
        if changes.held.shift is not None:
            start = bias.get("bias", torch.zeros(len(changes.held.shift), dtype=module.weight.dtype))
            bias = {"bias": module._shifted(start, changes.held.shift)}
        return {"weight": own["weight"], **bias}
    functions = pending(changes.weight)
    if not functions and not (changes.held and changes.held.factors):
        return own
    found = factors([patch for function in functions for patch in patches_of(function)], module.weight.shape)
    tiles = _tiles(module)
    if found is not None and tiles and low_rank(every := [*(changes.held.factors if changes.held else ()), *found]):
        full = json.loads(bytes(own["comfy_quant"].tolist())).get("full_precision_matrix_mult")
        pairs = _with_pairs(tiles, every, module.weight.dtype)
        conf = stored.conf_of(pairs) | ({"full_precision_matrix_mult": True} if full else {})
        leaves = {leaf: stored.as_saved(tensor) for leaf, tensor in stored.named(pairs)[1].items()}
        return {**leaves, **bias, "comfy_quant": marker(conf)}
    changes = type(changes)(functions, [], changes.held, None)
    weight, shape, dtype = module.weight, module.weight.shape, module.weight.dtype

    def dense() -> Tensor:
        made: Tensor = module._effective(weight, changes)
        return made

    if is_tiled(weight) and shifts(weight):
        return {**own, "weight_delta": lazy(shape, dtype, lambda: dense() - weight.to(torch.float32).dequantize())}
    return {"weight": lazy(shape, dtype, dense), **bias}


def as_parameters(module: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves with integers as what torch can make a Parameter of, where the layer is not in VRAM: the host's save
    nodes do that there, and fail with NVFP4 and INT8."""
    streamed = hasattr(module, "_v") or hasattr(module, "prev_comfy_cast_weights")
    if not streamed or getattr(module, "comfy_patched_weights", False) is True:
        return leaves
    return {leaf: tensor if tensor.is_floating_point() or leaf == "comfy_quant" else
            lazy(tensor.shape, tensor.dtype, functools.partial(_same, tensor)) for leaf, tensor in leaves.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tiles(module: Any) -> list[Tile]:
    """The weight of a Linear as tiles; none for a format of the host's that has no codec here."""
    if is_tiled(module.weight):
        return tiles_of(module.weight)
    tile = host_tiles.tile_of(module.weight, getattr(module, "input_scale", None))
    return [] if tile is None else [tile]


def _with_pairs(tiles: Sequence[Tile], found: Sequence[Any], dtype: torch.dtype) -> list[Tile]:
    """The tiles with longer low-rank pairs, which are computed when they are written."""
    def longer(tile: Tile, device: Any) -> Tile:
        return appended(tile, [one.made(lambda tensor: tensor.to(device, dtype)) for one in found], dtype)

    def pair(tile: Tile, name: str, size: Sequence[int], own: torch.dtype) -> Tensor:
        return lazy(size, own, lambda: longer(tile, tile["codes"].device)[name])

    out = []
    for tile in tiles:
        p, more = tile.place, sum(one.down.shape[0] for one in found if touches(tile.place, one))
        if not more:
            out.append(tile)
            continue
        sizes: dict[str, tuple[Sequence[int], torch.dtype]]
        if p.order:  # in a kernel's order, which pads
            made = longer(tile.apply(lambda tensor: tensor.to("meta")), "meta")
            sizes = {name: (made[name].shape, made[name].dtype) for name in ("down", "up")}
        else:
            rank = more + (tile["down"].shape[1] if "down" in tile.fields else 0)
            sizes = {"down": ((p.columns, rank), dtype), "up": ((p.rows, rank), dtype)}
        out.append(Tile(p, {**tile.fields, **{name: pair(tile, name, *size) for name, size in sizes.items()}}))
    return out


def with_factors(module: Any, found: Sequence[Any]) -> Tensor:
    """The weight of a Linear with these factors in it, for a file."""
    weight, tiles = module.weight, _tiles(module)
    if not found:
        return weight
    if not tiles or not low_rank(found):
        made: Tensor = module._made_dense(added(weight.to(torch.float32).dequantize(), found), module._shift())
        return made
    here = [one.made(lambda tensor: tensor.to(weight.device, weight.dtype)) for one in found]
    kernels = weight._params.kernels if is_tiled(weight) else ()
    delta = {"delta": weight._params.delta} if is_tiled(weight) else {}
    return parameter(*params_of([appended(tile, here, weight.dtype) for tile in tiles], weight.dtype,
                                tuple(weight.shape), kernels, **delta))

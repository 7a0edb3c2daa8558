"""The one own layout of the host's quantized tensors: tiles of any codec that make up a weight.

All that is large lives in Params, so that the host's memory management moves, pins, streams and saves it. The host
moves the fields of Params that are tensors, so there are fixed slots for them, and one plain value says which slot is
which field of which tile. Fields that several tiles have in common are one tensor in one slot.

Deletable the day the host's own layouts take parts with scales of their own, below and beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ...host.texts import Text
from ..codecs import codec
from ..tile import Place, Tile
from . import stored

NAME = "QTTilesLayout"
SLOTS = ("scale", *(f"t_{i}" for i in range(2, stored.MOST)))  # behind `_qdata`; the base class has the first


@dataclass(frozen=True)
class _Params(BaseLayoutParams):
    def _tensor_fields(self) -> list[str]:
        return [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]


class TilesLayout(QuantizedLayout):
    """`Params.tiles` are the places, `held` says where their fields are, `kernels` which kernel multiplies each (a name
    of quant.kernels). `delta` [rows, columns] is what patches that are no plain LoRA add, in `orig_dtype`."""

    QUANTIZES_INPUT = False  # each tile quantizes the activation its own way

    Params: Any = make_dataclass("Params", [
        *((slot, "Tensor | None", None) for slot in SLOTS[1:]), ("delta", "Tensor | None", None),
        ("tiles", tuple, ()), ("held", tuple, ()), ("kernels", tuple, ()), ("transposed", bool, False)],
        bases=(_Params,), frozen=True)

    @classmethod
    def quantize(cls, tensor: Tensor, like: Sequence[Tile] = (), kernels: tuple[str, ...] = (),
                 stochastic_rounding: int | None = 0, **options: Any) -> tuple[Tensor, Any]:
        """Code a patched weight [rows, columns] again, each tile as that of `like` at its place."""
        if not like:
            raise NotImplementedError(Text("tiles come from a checkpoint; a float weight alone does not say how to "
                                           "code it"))
        own = {name: options[name] for name in ("inplace_ops",) if name in options}  # scales are always new
        there = {id(t): t.to(tensor.device) for tile in like for t in tile.fields.values()}  # what stays, stays shared
        like = [tile.apply(lambda t: there[id(t)]) for tile in like]
        tiles = [codec(tile.place.codec).requantize(_at(tensor, tile.place).contiguous(), tile,
                                                    stochastic_rounding or 0, **own) for tile in like]
        return params_of(tiles, tensor.dtype, tuple(tensor.shape), kernels)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": tiles_of(qtensor), "kernels": qtensor._params.kernels}

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The effective weight in `orig_dtype`: the tiles by their codecs' definitions, plus delta, summed in F32.

        A plain matmul with it needs the bias that `plain_bias` gives.
        """
        rows, columns = reversed(params.orig_shape) if params.transposed else params.orig_shape
        dtype, tiles = params.orig_dtype if params.delta is None else torch.float32, _tiles(qdata, params)
        if len(tiles) == 1:
            out = codec(tiles[0].place.codec).dequantize(tiles[0], dtype)
        else:
            out = torch.empty(rows, columns, dtype=dtype, device=qdata.device)
            for tile in tiles:
                _at(out, tile.place).copy_(codec(tile.place.codec).dequantize(tile, dtype))
        return out if params.delta is None else (out + params.delta).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """Key suffix after "weight" -> tensor, as stored.read takes them."""
        named = stored.named(_tiles(qdata, params))[1]
        tensors = {leaf.removeprefix("weight"): stored.as_saved(tensor) for leaf, tensor in named.items()}
        return tensors if params.delta is None else {**tensors, "_delta": params.delta}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False  # it is multiply.py that knows


register_layout_class(NAME, TilesLayout)


def _at(weight: Tensor, place: Place) -> Tensor:
    return weight[place.row:place.row + place.rows, place.column:place.column + place.columns]


def _tiles(qdata: Tensor, params: Any) -> list[Tile]:
    return [Tile(place, {name: getattr(params, SLOTS[slot - 1]) if slot else qdata for name, slot in held})
            for place, held in zip(params.tiles, params.held, strict=True)]


def tiles_of(weight: QuantizedTensor) -> list[Tile]:
    """The tiles of a weight in this layout, as views."""
    return _tiles(weight._qdata, weight._params)


def params_of(tiles: Sequence[Tile], dtype: torch.dtype, shape: tuple[int, ...], kernels: tuple[str, ...] = (),
              **more: Any) -> tuple[Tensor, Any]:
    """(the first tensor, Params) of these tiles; one tensor that several tiles have takes one slot.

    Raises ValueError for more tensors than there are slots.
    """
    tensors, held, slots = list[Tensor](), [], dict[int, int]()
    for tile in tiles:
        own = []
        for name, tensor in tile.fields.items():
            if id(tensor) not in slots:
                slots[id(tensor)] = len(tensors)
                tensors.append(tensor)
            own.append((name, slots[id(tensor)]))
        held.append(tuple(own))
    if len(tensors) > stored.MOST:
        raise ValueError(Text("{tiles} tiles of {tensors} tensors, at most {most} are supported", tiles=len(tiles),
                              tensors=len(tensors), most=stored.MOST))
    named = {**dict.fromkeys(SLOTS), **dict(zip(SLOTS, tensors[1:], strict=False))}
    return tensors[0], TilesLayout.Params(
        orig_dtype=dtype, orig_shape=tuple(shape), tiles=tuple(tile.place for tile in tiles), held=tuple(held),
        kernels=kernels or ("",) * len(tiles), **named, **more)


def as_parameter(weight: QuantizedTensor) -> QuantizedTensor:
    """What torch.nn.Parameter() does for tensor subclasses, less the detach(): kitchen's detach clones every tensor in
    Params, which would copy what is memory-mapped."""
    weight._is_param = True
    return weight


def parameter(qdata: Tensor, params: Any) -> QuantizedTensor:
    """A weight parameter."""
    return as_parameter(QuantizedTensor(qdata, NAME, params))


def with_tiles(weight: QuantizedTensor, tiles: Sequence[Tile], **changes: Any) -> QuantizedTensor:
    """The weight with other tiles in the same places, as a parameter; `changes` replace further Params."""
    params = weight._params
    kept = {name: getattr(params, name) for name in ("delta", "transposed", "kernels")}
    return parameter(*params_of(tiles, params.orig_dtype, params.orig_shape, **{**kept, **changes}))


def is_tiled(weight: object) -> bool:
    """Whether a weight is in this layout."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME


def with_delta(weight: QuantizedTensor, change: Tensor) -> QuantizedTensor:
    """The weight with `change` [rows, columns], of its dtype, on top."""
    earlier = weight._params.delta
    return with_tiles(weight, tiles_of(weight), delta=change if earlier is None else earlier + change)


def shifts(weight: QuantizedTensor) -> bool:
    """Whether the stored bias is not the one that goes with the dequantized weight."""
    return any(codec(place.codec).shifts for place in weight._params.tiles)


def plain_shift(weight: QuantizedTensor) -> Tensor | None:
    """What the bias that goes with the dequantized weight has more than the stored one, F32 [rows], or None."""
    out = None
    for tile in tiles_of(weight) if shifts(weight) else ():
        kind, p = codec(tile.place.codec), tile.place
        shift = kind.shift(kind.residual(tile, torch.float32)) if kind.shifts else None
        if shift is not None:
            out = torch.zeros(weight._params.orig_shape[0], device=weight.device) if out is None else out
            out[p.row:p.row + p.rows] += shift
    return out


def plain_bias(weight: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """The bias that goes with the dequantized weight."""
    shift = plain_shift(weight)
    if shift is None:
        return bias
    return (shift if bias is None else bias.float() + shift).to(
        weight._params.orig_dtype if bias is None else bias.dtype)

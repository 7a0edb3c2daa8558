"""optimum-quanto's and torchao's weights of 8 bits, a scale a row or group, activations untouched.

    weight              I8 or F8_E4M3 [N, K]   quanto's weight._data, torchao's _weight_qdata
    weight_scale        float [N, 1]           quanto's weight._scale, torchao's _weight_scale
    weight_zero_point   I8 [N, 1]              torchao's _weight_zero_point; zeros, as its symmetric types have them
    input_scale, output_scale   float []       quanto's; 1 where it does not quantize activations

W = weight * weight_scale. Not ComfyUI's int8_tensorwise, which quantizes activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text
from ..codecs import fp8_blocks, int8
from ..scales import positive
from ..stored import ByteOrder, Leaves, StoredFormat
from ..tile import Coded, Place, Tile
from .bits import FLOATS, shapes_problem

if TYPE_CHECKING:
    from torch import Tensor

_LIKE: dict[str, StoredFormat] = {"I8": int8.FORMATS[1], "F8_E4M3": fp8_blocks.FORMATS[0]}


class Rows:
    """As a `stored.StoredFormat`, of weights in I8 or F8_E4M3."""

    words: frozenset[str] = frozenset()
    companions = frozenset({"weight_scale", "weight_zero_point", "output_scale", "input_scale"})

    def __init__(self, dtype: str) -> None:
        like = _LIKE[dtype]
        self.name, self.codec, self.colour, self.dtype = like.name, like.codec, like.colour, dtype

    def matches(self, leaves: Leaves) -> bool:
        return leaves["weight"].dtype == self.dtype and "weight_scale" in leaves

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        return shapes_problem(leaves, {
            "weight": (self.dtype, (rows, columns)), "weight_scale": (FLOATS, (rows, 1)),
            "weight_zero_point": ("I8", (rows, 1)), "output_scale": (FLOATS, ()), "input_scale": (FLOATS, ())})

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        point = part.get("weight_zero_point")
        if point is not None and bool(point.any()):
            raise ValueError(Text("{name} has zero points other than 0, which this version does not load", name=name))
        output_scale(name, part)
        place = Place(self.codec, part["weight"].shape[0], part["weight"].shape[1])
        scale = positive(f"{name}.weight_scale", part["weight_scale"])
        return Coded((Tile(place, {"codes": part["weight"], "scale": scale}),), part.get("bias"))


def output_scale(name: str, part: dict[str, Tensor]) -> None:
    """Raise ValueError where a layer of quanto's has quantized outputs: a scale of them other than 1."""
    out = part.get("output_scale")
    if out is not None and float(out) != 1:
        raise ValueError(Text("{name}.output_scale is {value}: outputs are quantized, which is not supported",
                              name=name, value=float(out)))

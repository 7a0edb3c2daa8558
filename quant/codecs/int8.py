"""INT8: symmetric codes with one scale, one for every row, or one for every block; ConvRot's rotated weights.

Stored per Linear P without a marker, the scale F32, BF16 or F16:

    P.weight         I8 [out, in]                W = weight.float() * scale
    P.weight_scale   [], [1], [out], [out, 1]    activations are quantized, too, a scale a token (LightX2V's int8)
                     [out / B, in / B(, 1)]      blocks: weights only
    P.input_scale    [], [1]                     activation amax / 127 (ModelOpt's W8A8_SQ_PER_CHANNEL): a scale a token
                                                 is finer, and taken instead
    P.pre_quant_scale  [in]                      what activations are multiplied by before (SmoothQuant)

The first is tiles of the codec "w8a8_dynamic" (ascend.py), which is ComfyUI's int8_tensorwise; blocks are "w8a16".

ConvRot (comfy-kitchen's tensor/int8.py): the codes are those of W H, where H rotates every group of columns by a
regular Hadamard matrix; W = (codes * scale) H^T. Only ComfyUI's markers say so. Its matmul is the host's; tiles of it
are for layers that ComfyUI keeps in one with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..layout_names import is_int8
from ..scales import POSITIVE, block_of, by_row, shape_problem
from ..stored import (
    PLAIN_DTYPES,
    ByteOrder,
    Leaves,
    factors,
    factors_problem,
    read_scale,
    scalar_problem,
    wrong_shape,
)
from ..tile import Coded, Place, Tile
from .base import LOW_RANK, Codec, Field, stack, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype

GROUPS = (16, 64, 256)  # of tiles: a regular Hadamard matrix has a power of four, and writers use these


class ConvRot(Codec):
    """See base.Codec and the module. "scale" is F32 [rows, 1]."""

    word = "int8_tensorwise"
    fields = {"codes": Field(("int8",), lambda rows, columns: (rows, columns), 0),
              "scale": Field(("float32",), lambda rows, columns: (rows, 1), 0, values=POSITIVE), **LOW_RANK}
    why = Text("rotated codes beside others")

    def __init__(self, group: int) -> None:
        self.name, self.title, self.group = f"int8_convrot{group}", "INT8 ConvRot", group
        self.conf = {"convrot": True, "convrot_groupsize": group}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        import torch
        from comfy_kitchen.tensor import TensorWiseINT8Layout

        params = TensorWiseINT8Layout.Params(
            scale=tile["scale"], orig_dtype=torch.float32, orig_shape=(tile.place.rows, tile.place.columns),
            convrot=True, convrot_groupsize=self.group)
        return TensorWiseINT8Layout.dequantize(tile["codes"].contiguous(), params).to(dtype)

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        from comfy_kitchen.tensor import TensorWiseINT8Layout

        codes, params = TensorWiseINT8Layout.quantize(
            weight, stochastic_rounding=seed, per_channel=True, convrot=True, convrot_groupsize=self.group)
        return like.having(codes=codes, scale=params.scale.float().reshape(-1, 1))

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        if any("down" in tile.fields for tile in tiles):
            return None
        whole = stack(tiles, self.fields)
        return {"weight": whole["codes"], "weight_scale": whole["scale"]}

    def of_host(self, weight: Any, input_scale: Tensor | None) -> Tile | None:
        p = weight._params
        if not is_int8(weight) or not p.convrot or p.convrot_groupsize != self.group:
            return None
        return Tile(Place(self.name, *p.orig_shape), {"codes": weight._qdata, "scale": by_row(
            f"{self.name}.scale", p.scale, p.orig_shape[0])})

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


class INT8Format:
    """As a `formats.StoredFormat`, by the number of scales: `blocks` or one a row or tensor."""

    words: frozenset[str] = frozenset()
    companions = frozenset({"weight_scale", "input_scale", "pre_quant_scale"})

    def __init__(self, name: str, codec: str, colour: tuple[int, int, int], blocks: bool) -> None:
        self.name, self.codec, self.colour, self.blocks = name, codec, colour, blocks

    def matches(self, leaves: Leaves) -> bool:
        weight, scale = leaves["weight"], leaves.get("weight_scale")
        if weight.dtype != "I8" or scale is None or scale.dtype not in PLAIN_DTYPES or "comfy_quant" in leaves:
            return False
        return self.blocks is (len(scale.shape) > 1 and scale.shape[1] > 1)

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        shape = tuple(leaves["weight_scale"].shape)
        if problem := wrong_shape(leaves, rows, columns) or shape_problem(shape, rows, columns):
            return problem
        if problem := scalar_problem(leaves, "input_scale") or factors_problem(leaves, rows, columns):
            return problem
        even = not self.blocks or block_of(columns, shape[1]) * shape[1] == columns
        return "" if even else Text("{count} blocks over {columns} columns are of different sizes", count=shape[1],
                                    columns=columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        codes, smooth = part["weight"], factors(name, part)[0]
        read_scale(name, part, "input_scale")
        tile = Tile(Place(self.codec, codes.shape[0], codes.shape[1]),
                    {"codes": codes, "scale": by_row(f"{name}.weight_scale", part["weight_scale"], codes.shape[0])})
        return Coded((tile if smooth is None else tile.having(mul=smooth.float()),), part.get("bias"))


CODECS = tuple(map(ConvRot, GROUPS))
FORMATS = (INT8Format("INT8", "w8a8_dynamic", (90, 150, 220), False),
           INT8Format("INT8 (blocks)", "w8a16", (110, 165, 225), True))

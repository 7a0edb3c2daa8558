"""NVFP4: E2M1 codes in pairs, an E4M3 scale for each 16 columns, and one F32 scale a tensor.

Stored per Linear P (docs/formats/nvfp4.md):

    P.weight          U8      [out, in / 2]   two E2M1 codes a byte
    P.weight_scale    F8_E4M3 [out, in / 16]  block scales, row-major or in 128 x 4 tiles (then possibly padded)
    P.weight_scale_2  F32     [] or [1]       weight amax / 2688
    P.input_scale     F32     [] or [1]       activation amax / 2688; absent means a dynamic scale, never 1.0

W[n, k] = e2m1(code) * weight_scale[n, k // 16] * weight_scale_2. E2M1: bit 3 is the sign, magnitudes are
0, 0.5, 1, 1.5, 2, 3, 4, 6.


Two byte orders exist and bytes alone do not tell them apart: ModelOpt writes even columns in the low nibble and
row-major scales, ComfyUI and Black Forest Labs the high nibble and tiles. A tile here has the latter, which is the
host's; rows need no padding in it, the host pads them to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..blocks import ceil_to, linear_blocks, pad_rows, swap_nibbles, swizzle
from ..marker import full_precision_marker
from ..stored import ByteOrder, Leaves, read_scale, scalar_problem
from ..tile import Coded, Place, Tile
from .base import LOW_RANK, Codec, Field
from .fp8 import INPUT_SCALE, SCALAR, leaves, one_scale

if TYPE_CHECKING:
    from torch import Tensor, dtype


class NVFP4(Codec):
    """See base.Codec."""

    name, title = "nvfp4", "NVFP4"
    word = switch = "nvfp4"
    one_input = True
    why = "a scale for each of q, k, v"
    fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // 2), 0),
              "block": Field(("float8_e4m3fn",),
                             lambda rows, columns: (ceil_to(rows, 128), ceil_to(columns // 16, 4)), 0),
              "scale": SCALAR, "input_scale": INPUT_SCALE, **LOW_RANK}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        from comfy_kitchen import dequantize_nvfp4

        return dequantize_nvfp4(tile["codes"].contiguous(), tile["scale"], tile["block"], dtype)

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        from comfy_kitchen.tensor import get_layout_class

        codes, params = get_layout_class("TensorCoreNVFP4Layout").quantize(
            weight, scale="recalculate", stochastic_rounding=seed, **options)
        return like.having(codes=codes[:like.place.rows], block=params.block_scale, scale=params.scale.reshape(()))

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        import torch

        if not one_scale(tiles):
            return None
        whole = tiles[0]
        if len(tiles) > 1:
            codes = torch.cat([tile["codes"] for tile in tiles])
            blocks = torch.cat([linear_blocks(tile["block"], *tile["codes"].shape) for tile in tiles])
            whole = whole.having(codes=codes, block=swizzle(blocks))
        return leaves(whole.having(codes=pad_rows(whole["codes"])), block="weight_scale", scale="weight_scale_2")

    def swapped(self, tile: Tile) -> Tile:
        import torch

        halves = tile["codes"], linear_blocks(tile["block"], *tile["codes"].shape)
        codes, block = (torch.cat(tuple(reversed(tensor.chunk(2)))) for tensor in halves)
        return tile.having(codes=codes, block=swizzle(block))


class NVFP4Format:
    """NVFP4 as a `formats.StoredFormat`."""

    name, codec = "NVFP4", "nvfp4"
    colour = (52, 132, 204)
    words = frozenset({"nvfp4"})
    companions = frozenset({"weight_scale", "weight_scale_2", "input_scale", "comfy_quant"})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        return leaves["weight"].dtype == "U8" and scale is not None and scale.dtype == "F8_E4M3" \
            and len(scale.shape) == 2

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        second = leaves.get("weight_scale_2")
        if second is None:
            return "NVFP4 weight without weight_scale_2"
        problem = scalar_problem(leaves, "weight_scale_2") or scalar_problem(leaves, "input_scale")
        if problem:
            return problem
        if columns % 16:
            return f"NVFP4 needs a multiple of 16 columns, this layer has {columns}"
        weight, scale = tuple(leaves["weight"].shape), tuple(leaves["weight_scale"].shape)
        if weight[1:] != (columns // 2,) or weight[0] not in (rows, ceil_to(rows, 16)):
            return f"weight is {list(weight)}, expected {[rows, columns // 2]} (two codes a byte)"
        padded = (ceil_to(rows, 128), ceil_to(columns // 16, 4))
        if scale not in ((rows, columns // 16), (weight[0], columns // 16), padded):
            return f"weight_scale is {list(scale)}, expected {[rows, columns // 16]} or {list(padded)} in tiles"
        return ""

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        codes, block = part["weight"], part["weight_scale"]
        if order.low_first:
            codes = swap_nibbles(codes)
        shape = (codes.shape[0], codes.shape[1] // 8)
        # A padded shape can only be tiles; a shape that needs no padding goes by the file's order.
        swizzled = order.swizzled or tuple(block.shape) != shape
        if swizzled and tuple(block.shape) != (ceil_to(shape[0], 128), ceil_to(shape[1], 4)):
            raise ValueError(f"{name}.weight_scale is {list(block.shape)}: too small for 128 x 4 tiles")
        fields = {"codes": codes, "block": block if swizzled else swizzle(block),
                  "scale": read_scale(name, part, "weight_scale_2"),
                  "input_scale": read_scale(name, part, "input_scale")}
        tile = Tile(Place("nvfp4", codes.shape[0], codes.shape[1] * 2)).having(**fields)
        return Coded((tile,), part.get("bias"), full_precision=full_precision_marker(name, part, ("nvfp4",)))


NVFP4_FORMAT = NVFP4Format()
CODECS, FORMATS = (NVFP4(),), (NVFP4_FORMAT,)

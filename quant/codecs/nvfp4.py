"""NVFP4: E2M1 codes in pairs, an E4M3 scale for each 16 columns, and one F32 scale a tensor.

Stored per Linear P (docs/formats/nvfp4.md):

    P.weight             U8      [out, in / 2]   two E2M1 codes a byte
    P.weight_scale       F8_E4M3 [out, in / 16]  block scales (or U8 with their bytes), row-major or in 128 x 4 tiles,
                                                 possibly padded
    P.weight_scale_2     F32     [] or [1]       weight amax / 2688
    P.input_scale        F32     [] or [1]       activation amax / 2688; absent means a dynamic scale, never 1.0
    P.pre_quant_scale    BF16    [in]            what activations are multiplied by before all else (NVFP4_AWQ)
    P.svdquant_lora_a    BF16    [rank, in]      the low-rank pair of NVFP4_SVD, on the multiplied activation
    P.svdquant_lora_b    BF16    [out, rank]
    P.alpha, P.input_global_scale                LightX2V's weight_scale_2 / global and global = 1 / input_scale

W[n, k] = (e2m1(code) * weight_scale[n, k // 16] * weight_scale_2 + (b @ a)[n, k]) * pre_quant_scale[k]. E2M1: bit 3 is
the sign, magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6.

Two byte orders exist and bytes alone do not tell them apart: ModelOpt writes even columns in the low nibble and
row-major scales, ComfyUI and Black Forest Labs the high nibble and tiles; LightX2V mixes the two. A tile here has
ComfyUI's; rows need no padding in it, the host pads them to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..blocks import ceil_to, linear_blocks, pad_rows, swap_nibbles, swizzle
from ..marker import full_precision_marker
from ..scales import NOT_NEGATIVE, POSITIVE
from ..stored import FACTORS, ByteOrder, Leaves, factors, factors_problem, read_scale, scalar_problem
from ..tile import Coded, Place, Tile
from .base import FLOATS, LOW_RANK, Codec, Field, scalar
from .fp8 import INPUT_SCALE, SCALAR, leaves, one_scale

if TYPE_CHECKING:
    from torch import Tensor, dtype

# LightX2V's names for the scales of a tensor and of its activation, both of which or none are there.
_LIGHT = ("alpha", "input_global_scale")


class NVFP4(Codec):
    """See base.Codec. `mul` [columns] is multiplied into the activation before it is quantized; the low-rank branch is,
    as everywhere, on the activation as it comes."""

    name, title = "nvfp4", "NVFP4"
    word = switch = "nvfp4"
    layout = "TensorCoreNVFP4Layout"
    one_input = True
    why = Text("a scale for each of q, k, v, or factors of the activation")
    fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // 2), 0),
              "block": Field(("float8_e4m3fn",),
                             lambda rows, columns: (ceil_to(rows, 128), ceil_to(columns // 16, 4)), 0,
                             values=NOT_NEGATIVE),
              "scale": SCALAR, "input_scale": INPUT_SCALE,
              "mul": Field(FLOATS, lambda rows, columns: (columns,), optional=True, values=POSITIVE), **LOW_RANK}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        import torch
        from comfy_kitchen import dequantize_nvfp4

        mul = tile.get("mul")
        weight = dequantize_nvfp4(tile["codes"].contiguous(), tile["scale"], tile["block"],
                                  dtype if mul is None else torch.float32)
        return weight if mul is None else (weight * mul.float()).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        decode_rows(tile["codes"], tile["block"], tile["scale"], first, last, out)
        if "mul" in tile.fields:
            import torch

            from ..decode import each

            each(torch.Tensor.mul_, out, tile["mul"].float())

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        from comfy_kitchen.tensor import get_layout_class

        down, up, mul = like.get("down"), like.get("up"), like.get("mul")
        dtype = weight.dtype
        if down is not None and up is not None:
            weight = (weight.float() - up.float() @ down.float().t()).to(dtype)
        if mul is not None:
            weight = (weight.float() / mul.float()).to(dtype)
        codes, params = get_layout_class("TensorCoreNVFP4Layout").quantize(
            weight, scale="recalculate", stochastic_rounding=seed, **options)
        return like.having(codes=codes[:like.place.rows], block=params.block_scale, scale=params.scale.reshape(()))

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        """Not with `mul`: the host's pre_quant_scale multiplies the activation also of what a LoRA adds."""
        import torch

        from ..memory import cat

        if not one_scale(tiles) or any("mul" in tile.fields for tile in tiles):
            return None
        whole = tiles[0]
        if len(tiles) > 1:
            codes = cat([tile["codes"] for tile in tiles])
            blocks = [tile["block"] for tile in tiles]
            if any(len(tile["codes"]) % 128 for tile in tiles):
                blocks = [swizzle(torch.cat([linear_blocks(tile["block"], *tile["codes"].shape) for tile in tiles]))]
            whole = whole.having(codes=codes, block=cat(blocks) if len(blocks) > 1 else blocks[0])
        return leaves(whole.having(codes=pad_rows(whole["codes"])), block="weight_scale", scale="weight_scale_2")

    def of_host(self, weight: Any, input_scale: Tensor | None) -> Tile | None:
        if weight._layout_cls != self.layout:
            return None
        rows, columns = weight._params.orig_shape
        return Tile(Place(self.name, rows, columns), {"codes": weight._qdata[:rows]}).having(
            block=weight._params.block_scale, scale=scalar(weight._params.scale), input_scale=scalar(input_scale))

    def cut(self, tile: Tile, first: int, rows: int) -> Tile:
        block = linear_blocks(tile["block"], *tile["codes"].shape)[first:first + rows]
        return super().cut(tile.having(block=None), first, rows).having(block=swizzle(block))

    def swapped(self, tile: Tile) -> Tile:
        import torch

        halves = tile["codes"], linear_blocks(tile["block"], *tile["codes"].shape)
        codes, block = (torch.cat(tuple(reversed(tensor.chunk(2)))) for tensor in halves)
        up = tile.get("up")
        return tile.having(codes=codes, block=swizzle(block),
                           up=None if up is None else torch.cat(tuple(reversed(up.chunk(2)))))


def decode_rows(codes: Tensor, block: Tensor, scale: Tensor, first: int, last: int, out: Tensor) -> None:
    """Rows `first` to `last` of codes and block scales in the host's order, into F32 `out`: code * (tensor scale *
    block scale), as comfy-kitchen's eager dequantize_nvfp4 has it. 128 rows of block scales are one row of tiles."""
    from ..decode import looked_up, of_rows, scaled_e4m3

    start = first // 128 * 128
    blocks = linear_blocks(block[start:ceil_to(last, 128)], last - start, codes.shape[1])[first - start:]
    looked_up(of_rows(codes, first, last), _pairs(), out, scaled_e4m3(blocks, scale.float()))


@cache
def _pairs() -> Any:
    from ..ascend.mx import E2M1
    from ..decode import pairs

    return pairs((*E2M1, *(-value for value in E2M1)), low_first=False)


class NVFP4Format:
    """NVFP4 as a `formats.StoredFormat`."""

    name, codec = "NVFP4", "nvfp4"
    colour = (52, 132, 204)
    words = frozenset({"nvfp4"})
    companions = frozenset({"weight_scale", "weight_scale_2", "input_scale", "comfy_quant", *FACTORS, *_LIGHT})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        if leaves["weight"].dtype != "U8" or scale is None or len(scale.shape) != 2:
            return False
        return scale.dtype == "F8_E4M3" or scale.dtype == "U8" and bool({"weight_scale_2", "alpha"} & leaves.keys())

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if {"weight_scale_2", "alpha"} <= leaves.keys() or {"input_scale", "input_global_scale"} <= leaves.keys():
            return Text("scales by ModelOpt's names and by LightX2V's, and one of them is enough")
        if "weight_scale_2" not in leaves and not leaves.keys() >= set(_LIGHT):
            return Text("NVFP4 weight without weight_scale_2")
        for leaf in ("weight_scale_2", "input_scale", *_LIGHT):
            if problem := scalar_problem(leaves, leaf):
                return problem
        if columns % 16:
            return Text("NVFP4 needs a multiple of 16 columns, this layer has {columns}", columns=columns)
        weight, scale = tuple(leaves["weight"].shape), tuple(leaves["weight_scale"].shape)
        if weight[1:] != (columns // 2,) or weight[0] not in (rows, ceil_to(rows, 16)):
            return Text("weight is {found}, expected {expected} (two codes a byte)", found=list(weight),
                        expected=[rows, columns // 2])
        if not row_major(scale, weight, rows) and not tiled(scale, weight):
            padded = [ceil_to(rows, 128), ceil_to(columns // 16, 4)]
            return Text("weight_scale is {found}, expected {expected} or {padded} in tiles", found=list(scale),
                        expected=[rows, columns // 16], padded=padded)
        return factors_problem(leaves, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        import torch

        codes, block = part["weight"], part["weight_scale"].view(torch.float8_e4m3fn)
        if order.low_first:
            codes = swap_nibbles(codes)
        fields = {"codes": codes, "block": _in_tiles(name, codes, block, order.swizzled), **_scales(name, part)}
        tile = Tile(Place("nvfp4", codes.shape[0], codes.shape[1] * 2)).having(**fields, **_factors(name, part))
        return Coded((tile,), part.get("bias"), full_precision=full_precision_marker(name, part, ("nvfp4",)))


def row_major(scale: Sequence[int], weight: Sequence[int], rows: int) -> bool:
    """Whether block scales of this shape are row-major, rows and columns padded to 16 or not (ModelOpt's
    padding_strategy)."""
    columns = weight[1] // 8
    return scale[0] in (rows, weight[0]) and scale[1] in (columns, ceil_to(columns, 16))


def tiled(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether they are as large as in tiles."""
    columns = weight[1] // 8
    return scale[0] == ceil_to(weight[0], 128) and scale[1] in (ceil_to(columns, 4), ceil_to(columns, 16))


def _in_tiles(name: str, codes: Tensor, block: Tensor, swizzled: bool) -> Tensor:
    """Stored block scales -> tiles of the size that these codes need. A padded shape can only be tiles; a shape that
    needs no padding goes by the file's order."""
    rows, half = codes.shape
    wanted = (ceil_to(rows, 128), ceil_to(half // 8, 4))
    if not swizzled and row_major(block.shape, codes.shape, rows):
        return swizzle(block[:, :half // 8])
    if not tiled(block.shape, codes.shape):
        raise ValueError(Text("{name}.weight_scale is {shape}: too small for 128 x 4 tiles", name=name,
                              shape=list(block.shape)))
    if tuple(block.shape) == wanted:
        return block
    return swizzle(linear_blocks(block, rows, block.shape[1] * 8)[:, :half // 8])


def _scales(name: str, part: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The scales of a tensor and of its activation (None: dynamic), by either writer's names."""
    if "alpha" not in part:
        return {"scale": read_scale(name, part, "weight_scale_2"), "input_scale": read_scale(name, part, "input_scale")}
    alpha, whole = (read_scale(name, part, leaf) for leaf in _LIGHT)
    assert alpha is not None and whole is not None
    return {"scale": alpha * whole, "input_scale": 1 / whole}


def _factors(name: str, part: dict[str, Tensor]) -> dict[str, Tensor]:
    """`mul`, and the low-rank pair on the activation as it comes: F32, which holds products of BF16 numbers exactly."""
    smooth, down, up = factors(name, part)
    found = {} if smooth is None else {"mul": smooth}
    if down is not None and up is not None:
        down = down.float() if smooth is None else down.float() * smooth.float()
        found |= {"down": down.t().contiguous(), "up": up}
    return found


NVFP4_FORMAT = NVFP4Format()
CODECS, FORMATS = (NVFP4(),), (NVFP4_FORMAT,)

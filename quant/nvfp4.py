"""NVFP4: E2M1 codes in pairs, an E4M3 scale for each 16 columns, and one F32 scale a tensor.

Stored per Linear P (docs/formats/nvfp4.md):

    P.weight          U8      [out, in / 2]   two E2M1 codes a byte
    P.weight_scale    F8_E4M3 [out, in / 16]  block scales, row-major or in 128 x 4 tiles (then possibly padded)
    P.weight_scale_2  F32     [] or [1]       weight amax / 2688
    P.input_scale     F32     [] or [1]       activation amax / 2688; absent means a dynamic scale, never 1.0

W[n, k] = e2m1(code) * weight_scale[n, k // 16] * weight_scale_2. E2M1: bit 3 is the sign, magnitudes are
0, 0.5, 1, 1.5, 2, 3, 4, 6.

Two byte orders exist and bytes alone do not tell them apart: ModelOpt writes even columns in the low
nibble and row-major scales, ComfyUI and Black Forest Labs the high nibble and tiles. The host wants the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shards import HOST_FORMAT, Shard, full_precision_marker, read_scale
from .stored import ByteOrder, Leaves, scalar_problem

if TYPE_CHECKING:
    from torch import Tensor


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


class NVFP4Format:
    """NVFP4 as a `formats.StoredFormat`."""

    name = "NVFP4"
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

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        data, block = part["weight"], part["weight_scale"]
        if order.low_first:
            data = swap_nibbles(data)
        shape = (data.shape[0], data.shape[1] // 8)
        # A padded shape can only be tiles; a shape that needs no padding goes by the file's order.
        swizzled = order.swizzled or tuple(block.shape) != shape
        if swizzled and tuple(block.shape) != (ceil_to(shape[0], 128), ceil_to(shape[1], 4)):
            raise ValueError(f"{name}.weight_scale is {list(block.shape)}: too small for 128 x 4 tiles")
        return [Shard(name, "nvfp4", data, read_scale(name, part, "weight_scale_2"), block, swizzled,
                      read_scale(name, part, "input_scale"),
                      full_precision_marker(name, part, (HOST_FORMAT["nvfp4"],)))]


NVFP4 = NVFP4Format()


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the two E2M1 codes of every byte (0xAB -> 0xBA)."""
    swapped = codes << 4
    swapped |= codes >> 4
    return swapped


def swizzle(block: Tensor) -> Tensor:
    """Block scales [rows, columns] -> 128 x 4 tiles, padded with zeros: [ceil128(rows), ceil4(columns)]."""
    import torch
    from comfy_kitchen.float_utils import to_blocked

    return to_blocked(block.view(torch.uint8), flatten=False).view(block.dtype)


def linear_blocks(shard: Shard) -> Tensor:
    """The block scales of an NVFP4 shard as [rows, columns / 16]."""
    import torch
    from comfy_kitchen.float_utils import from_blocked

    assert shard.block is not None
    if not shard.swizzled:
        return shard.block
    rows, columns = shard.data.shape[0], shard.data.shape[1] // 8
    return from_blocked(shard.block.view(torch.uint8), rows, columns).contiguous().view(shard.block.dtype)


def pad_rows(data: Tensor) -> Tensor:
    """Pad with zero rows to a multiple of 16, as the host's NVFP4 layout stores it; a view when nothing is missing."""
    import torch

    missing = -data.shape[0] % 16
    return torch.nn.functional.pad(data, (0, 0, 0, missing)) if missing else data


def dequantize(shard: Shard) -> Tensor:
    """An NVFP4 shard in F32 [rows, columns], by its definition."""
    import torch
    from comfy_kitchen import dequantize_nvfp4

    assert shard.scale is not None and shard.block is not None
    block = shard.block if shard.swizzled else swizzle(shard.block)
    return dequantize_nvfp4(shard.data.contiguous(), shard.scale, block, torch.float32)

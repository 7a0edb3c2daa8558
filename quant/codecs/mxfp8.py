"""MXFP8 without a marker: E4M3 codes and an E8M0 scale for every 32 columns, row-major (ModelOpt's MXFP8 exports).

    P.weight         F8_E4M3 [out, in]
    P.weight_scale   U8 or F8_E8M0 [out, ceil(in / 32)]   W = weight.float() * 2 ^ (scale - 127)

Tiles of the codec "w8a8_mxfp8" (ascend.py), which the host's layout holds. Scales in 128 x 4 tiles are ComfyUI's, whose
markers say so; here they are known by a padded shape alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text
from ..ascend.kinds import BLOCK
from ..blocks import ceil_to
from ..stored import ByteOrder, Leaves, wrong_shape
from ..tile import Coded, Place, Tile

if TYPE_CHECKING:
    from torch import Tensor


class MXFP8Format:
    """As a `formats.StoredFormat`."""

    name, codec = "MXFP8", "w8a8_mxfp8"
    colour = (235, 130, 60)
    words: frozenset[str] = frozenset()  # ComfyUI's markers mean its own order of scales
    companions = frozenset({"weight_scale"})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        return leaves["weight"].dtype == "F8_E4M3" and scale is not None and scale.dtype in ("U8", "F8_E8M0") \
            and "comfy_quant" not in leaves

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        scale, blocks = tuple(leaves["weight_scale"].shape), -(-columns // BLOCK)
        if scale not in ((rows, blocks), tiled_shape(rows, columns)):
            return Text("weight_scale is {found}, expected {expected}", found=list(scale), expected=[rows, blocks])
        return wrong_shape(leaves, rows, columns)

    def coded(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> Coded:
        codes, scale = part["weight"], part["weight_scale"]
        in_tiles = tuple(scale.shape) != (codes.shape[0], -(-codes.shape[1] // BLOCK))
        return Coded((tile(codes, scale, *codes.shape, in_tiles=in_tiles),), part.get("bias"))


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the scales of a [rows, columns] weight in 128 x 4 tiles."""
    return ceil_to(rows, 128), ceil_to(-(-columns // BLOCK), 4)


def tile(codes: Tensor, scale: Tensor, rows: int, columns: int, *, in_tiles: bool) -> Tile:
    """Stored codes and scales without their padding."""
    import torch
    from comfy_kitchen.float_utils import from_blocked

    scale = scale.view(torch.uint8)
    if in_tiles:
        scale = from_blocked(scale, codes.shape[0], -(-codes.shape[1] // BLOCK))
        scale = scale[:rows, :-(-columns // BLOCK)].contiguous()
    return Tile(Place("w8a8_mxfp8", rows, columns), {"codes": codes[:rows, :columns], "scale": scale})


CODECS, FORMATS = (), (MXFP8Format(),)

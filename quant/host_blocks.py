"""ComfyUI's INT8 and MXFP8 as its markers have them: what is wrong with a layer, and the layer as a tile.

Sources: ComfyUI's comfy/ops.py (_load_quantized_module), comfy-kitchen's tensor/int8.py and tensor/mxfp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..host.texts import Text, either
from .ascend.kinds import BLOCK
from .codecs import mxfp8
from .scales import EXPONENTS, POSITIVE, by_row
from .stored import Stored
from .tile import Place, Tile

if TYPE_CHECKING:
    from torch import Tensor

SIZES = tuple(4 ** i for i in range(1, 8))  # of a regular Hadamard matrix
WEIGHTS = {"int8_tensorwise": ("I8",), "mxfp8": ("F8_E4M3",)}
RULES = {"int8_tensorwise": POSITIVE, "mxfp8": EXPONENTS}  # of scales.py, for the scale
SCALES = {"int8_tensorwise": ("F32", "BF16", "F16"), "mxfp8": ("U8", "F8_E8M0")}


def convrot(conf: Mapping[str, Any]) -> int:
    """The columns of a group that ConvRot rotates, by a marker; 0 for none."""
    params = conf.get("params")
    conf = {**(params if isinstance(params, dict) else {}), **conf}
    group = conf.get("convrot_groupsize", 256)
    return 0 if not conf.get("convrot") else group if isinstance(group, int) else -1


def problem(word: str, conf: Mapping[str, Any], leaves: Mapping[str, Stored], rows: int, columns: int) -> str:
    """What is wrong with a layer in one of these formats; empty when nothing is."""
    weight, scale = leaves["weight"], leaves.get("weight_scale")
    if weight.dtype not in WEIGHTS[word]:
        return Text("weight is {found}, expected {expected}", found=weight.dtype, expected=either(WEIGHTS[word]))
    shape = tuple(weight.shape)
    if len(shape) != 2 or not (0 <= shape[0] - rows < BLOCK and 0 <= shape[1] - columns < BLOCK):
        return Text("weight is {found}, expected {expected}", found=list(shape), expected=[rows, columns])
    if scale is None:
        return Text("weight_scale is missing, expected {expected}", expected=either(SCALES[word]))
    if scale.dtype not in SCALES[word]:
        return Text("weight_scale is {found}, expected {expected}", found=scale.dtype, expected=either(SCALES[word]))
    seen = tuple(scale.shape)
    if word == "mxfp8":
        tiled = mxfp8.tiled_shape(*shape)
        return "" if seen == tiled else Text("weight_scale is {found}, expected {expected} (128 x 4 tiles)",
                                             found=list(seen), expected=list(tiled))
    if seen not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
        return Text("weight_scale is {shape}, expected one value, or one a row", shape=list(seen))
    group = convrot(conf)
    if group and (group not in SIZES or columns % group):
        return Text("convrot_groupsize is {group}, expected a power of four that divides {columns}", group=group,
                    columns=columns)
    return ""


def int8_scale(scale: Tensor) -> Tensor:
    """A scale as the host's matmuls and dequantization take it: F32, [] or [rows, 1]."""
    scale = scale.float()
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())


def tile(name: str, conf: Mapping[str, Any], part: Mapping[str, Tensor], rows: int, columns: int) -> Tile:
    """A layer without its padding. Raises ValueError for scales of rows that are not finite and positive."""
    codes, scale = part["weight"], part["weight_scale"]
    if conf["format"] == "mxfp8":
        return mxfp8.tile(codes, scale, rows, columns, in_tiles=True)
    group = convrot(conf)
    place = Place(f"int8_convrot{group}" if group else "w8a8_dynamic", rows, columns)
    return Tile(place, {"codes": codes[:rows, :columns],
                        "scale": by_row(f"{name}.weight_scale", scale, codes.shape[0])[:rows]})

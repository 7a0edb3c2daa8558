"""In which byte order a file's NVFP4 is: by names and declarations, by shapes, by the scales' values, by the user.

Names and shapes are in the headers (`from_headers`); values are read where these leave it open, when a checkpoint is
loaded (`settle`). ModelOpt's export writes its quantization_config into the files' own headers only where it has
rearranged something (padding, tiles, metadata: export/unified_export_hf.py, _postprocess_safetensors), so a config.json
beside headers without one says row-major.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...host.texts import Text
from ...quant.codecs.nvfp4 import row_major, tiled
from ...quant.stored import LIKELY, OPEN, TOLD, ByteOrder
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import TensorInfo
from ..description import CheckpointDescription
from ..errors import CheckpointError
from .declarations import Declaration

LIGHT = ByteOrder(low_first=True, swizzled=True, why=Text("LightX2V's names"))
# What the nodes' `byte_order` means.
CHOICES = {"modelopt": (True, False), "modelopt_tiled": (True, True), "comfyui": (False, True)}
MOST = 64  # weights whose scales are read, spread over the file
_PACKED_QKV = re.compile(r"(^|\.)(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$",
                         re.MULTILINE)


def from_headers(tensors: Mapping[str, TensorInfo], declaration: Declaration) -> ByteOrder:
    """As LightX2V's names say (low nibble first, tiled scales), else swap_weight_nibbles, else ComfyUI's markers (high
    nibble first, tiled scales), else the scales' shapes; else likely that of Black Forest Labs (ComfyUI's) for packed
    q/k/v, and ModelOpt's for its exports (docs/sources/sglang.md, "NVFP4 by tensors"); else open.

    Raises ValueError for shapes that contradict each other.
    """
    text = "\n".join(tensors)
    packed, comfy = bool(_PACKED_QKV.search(text)), ".comfy_quant" in text or declaration.comfy
    if ".input_global_scale" in text and not comfy:
        return LIGHT
    swap = declaration.swap_weight_nibbles
    shapes = "" if comfy or ".weight_scale_2" not in text else by_shapes(tensors)
    if swap is not None:
        why = Text("packed q/k/v") if packed else Text("ComfyUI's markers") if comfy else Text("ModelOpt's default")
        tiled = packed or comfy or shapes == "tiles"
        return ByteOrder(not swap, tiled, Text("swap_weight_nibbles = {swap}, {why}", swap=str(swap).lower(), why=why))
    if comfy:
        return ByteOrder(False, True, Text("ComfyUI's markers"))
    if shapes == "rows":
        return ByteOrder(True, False, Text("ModelOpt's order: scales have shapes that tiles never have"))
    if packed:
        return ByteOrder(False, True, Text("packed q/k/v"), LIKELY)
    if shapes == "tiles":
        return ByteOrder(True, True, Text("ModelOpt's order, in tiles: scales have shapes that only these have"))
    plain = declaration.family.startswith("modelopt") and declaration.origins == ("config.json",)
    return ByteOrder(True, False, Text("ModelOpt's default"), LIKELY if plain else OPEN)


def by_shapes(tensors: Mapping[str, TensorInfo]) -> str:
    """"rows" or "tiles" where some block scales have a shape of only one of them, else empty. Raises ValueError for
    both in one file."""
    found = set()
    for _, weight, scale in _scales(tensors):
        rows, tiles = row_major(scale.shape, weight.shape, weight.shape[0]), tiled(scale.shape, weight.shape)
        found |= {"rows"} if rows and not tiles else {"tiles"} if tiles and not rows else set()
    if len(found) > 1:
        raise ValueError(Text("the block scales of some layers have shapes of 128 x 4 tiles, those of others are "
                              "row-major"))
    return next(iter(found), "")


def _scales(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo, TensorInfo]]:
    """(layer, weight, block scales) of every NVFP4 layer."""
    found = []
    for name, scale in tensors.items():
        layer = name.removesuffix(".weight_scale")
        weight = tensors.get(f"{layer}.weight")
        if layer != name and weight is not None and f"{layer}.weight_scale_2" in tensors and weight.dtype == "U8" \
                and scale.dtype in ("F8_E4M3", "U8") and len(scale.shape) == len(weight.shape) == 2:
            found.append((layer, weight, scale))
    return found


def note(order: ByteOrder) -> str:
    """The order in words, for reports."""
    why = order.why if order.certain == TOLD else \
        Text("{why}; the scales' values are asked when it is loaded", why=order.why)
    return Text("NVFP4 bytes: even columns in the {half} nibble, block scales {order} ({why})",
                half=Text("low") if order.low_first else Text("high"),
                order=Text("in 128 x 4 tiles") if order.swizzled else Text("row-major"), why=why)


PREFIX = "NVFP4 bytes:"  # of a note


def settle(checkpoint: Checkpoint, description: CheckpointDescription, wanted: str) -> None:
    """Decide what headers left open, in the description. `wanted` is "auto" or one of CHOICES.

    Raises CheckpointError where nothing tells, where values contradict each other, and for a wish against what a file
    says of itself.
    """
    order, where = description.byte_order, checkpoint.source.reference
    if "NVFP4" not in description.formats:
        if wanted != "auto":
            description.notes.append(Text("byte_order {wanted} has no effect, there are no NVFP4 layers",
                                          wanted=wanted))
        return
    if wanted != "auto":
        asked = CHOICES.get(wanted)
        if asked is None:
            raise CheckpointError(Text("byte_order is {wanted!r}, expected auto, {choices}", wanted=wanted,
                                       choices=", ".join(CHOICES)), where,
                                  Text("set byte_order to 'auto'"))
        if order.certain == TOLD and asked != order[:2]:
            raise CheckpointError(Text("byte_order is {wanted}, and the file says otherwise: {order}", wanted=wanted,
                                       order=note(order)), where,
                                  Text("set byte_order to 'auto'"))
        found = ByteOrder(*asked, Text("byte_order {wanted}, as chosen", wanted=wanted))
    elif order.certain == TOLD:
        return
    else:
        found = _by_values(checkpoint, order, where)
    description.byte_order = found
    description.notes[:] = [note(found) if text.startswith(PREFIX) else text for text in description.notes]


def _by_values(checkpoint: Checkpoint, order: ByteOrder, where: str) -> ByteOrder:
    from ...quant import nvfp4_order as values

    layers = [layer for layer, weight, scale in _scales(checkpoint.tensors)
              if not weight.shape[0] % 128 and not weight.shape[1] % 32]
    tensors = checkpoint.load_tensors()
    step = max(1, len(layers) // MOST)
    try:
        tiles, score = values.decide(values.score(tensors[f"{layer}.weight_scale"]) for layer in layers[::step])
    except ValueError as error:
        raise CheckpointError(error, where, Text("report it to its publisher")) from error
    told = Text("the scales' values say so: {score:.0f} where {margin:.0f} decide", score=abs(score),
                margin=values.MARGIN)
    if tiles is None and order.certain == LIKELY:
        return order._replace(why=Text("{why}; the scales' values do not tell", why=order.why), certain=TOLD)
    if tiles is None:
        raise CheckpointError(
            Text("nothing tells in which order the NVFP4 block scales are: the file has no marker and no config.json "
                 "of ModelOpt's, and their values do not say ({score:.1f} where {margin:.0f} decide)",
                 score=abs(score), margin=values.MARGIN), where,
            Text("set byte_order to 'modelopt' (row-major, ModelOpt's default) or 'modelopt_tiled' (128 x 4 tiles, its "
                 "enable_swizzle_layout), as its publisher says"))
    low = order.low_first if tiles else True  # row-major is ModelOpt's alone
    return ByteOrder(low, tiles, told if tiles == order.swizzled else
                     Text("{told}, against {why}", told=told, why=order.why))

"""The stored tensors of one ModelSlim layer -> the tensors of a native layer (schemes.py says which types exist)."""

from __future__ import annotations

from typing import Any

import torch

from ..nvfp4 import swizzle
from ..shards import marker
from . import integers, mx
from .kinds import BLOCK, HOST_FORMAT, KINDS, MARKER
from .layout import AscendLayout, as_ascend, decode
from .native import OWN_LEAVES, NativeLayer, float_bias, smoothing

Part = dict[str, torch.Tensor]


def native_layer(kind: str, name: str, part: Part, bias: bool) -> NativeLayer:
    """Build the layer. Raises ValueError for scales and offsets that mean nothing; see schemes.Scheme.tensors."""
    codec = KINDS[kind].codec
    mul, notes = smoothing(name, part), []
    data, own = _static(name, part) if kind == "w8a8" else _codes(kind, name, part)
    rows, columns = data.shape[0], data.shape[1] * (2 if codec in ("int4", "mxfp4", "mxfp4_dual") else 1)
    floats = _bias_of_static(name, part, data, own, bias) if kind == "w8a8" else float_bias(name, part, bias)
    if mul is not None:
        own["mul"] = mul
        notes.append(f"{name}: activations are multiplied by its smoothing vector")
    host = HOST_FORMAT.get(kind)
    if host == "mxfp8" and _tiny_blocks(data, own["scale"]):
        host = None  # the host decodes byte 0 as zero
    if host is None or mul is not None:
        tensors = {"weight": data, **{f"weight_{leaf}": tensor for leaf, tensor in own.items()}}
        layout = MARKER + kind
    else:
        tensors, layout = _host(host, data, own["scale"]), host
    return NativeLayer(tensors | floats | {"comfy_quant": marker({"format": layout})}, rows, columns, kind, layout,
                       tuple(notes))


def _positive(name: str, leaf: str, scale: torch.Tensor) -> torch.Tensor:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{name}.{leaf} has values that are not finite and positive")
    return scale


def _codes(kind: str, name: str, part: Part) -> tuple[torch.Tensor, Part]:
    """Codes as the layout keeps them, and its other tensors, for every kind but static W8A8."""
    weight, scale, codec = part["weight"], part["weight_scale"], KINDS[kind].codec
    own: Part = {}
    if codec.startswith("mx"):
        own["scale"] = scale.view(torch.uint8)
        if bool((own["scale"] == 255).any()):
            raise ValueError(f"{name}.weight_scale has bytes 255, which are NaN")
        if codec != "mxfp8" and weight.dtype == mx.E4M3:  # old writers kept the E2M1 numbers in E4M3
            values = weight.float()
            weight = mx.pack(mx.encode_e2m1(values, False))
            if not torch.equal(mx.decode_e2m1(mx.unpack(weight)), values):
                raise ValueError(f"{name}.weight is E4M3 with values that are not E2M1 numbers")
        if codec == "mxfp4_dual":
            dual = part["weight_dual_scale"].float().reshape(scale.shape[0], -1)
            if not bool((dual.isfinite() & (dual >= 0)).all()):
                raise ValueError(f"{name}.weight_dual_scale has values that are negative or not finite")
            own["dual"] = dual
        return weight.view(torch.uint8) if codec != "mxfp8" else weight, own
    own["scale"] = _positive(name, "weight_scale", scale.float().reshape(scale.shape[0], -1))
    offset = part.get("weight_offset")
    if offset is not None and bool((offset != 0).any()):
        if KINDS[kind].activation:
            raise ValueError(f"{name}.weight_offset is not zero; integer matmuls of an NPU ignore it")
        own["offset"] = offset.float().reshape(offset.shape[0], -1).expand(own["scale"].shape).contiguous()
    if codec == "int4":
        if weight.shape[0] != scale.shape[0]:
            weight = integers.unpack_rows(weight)
        elif bool(((weight < -8) | (weight > 7)).any()):
            raise ValueError(f"{name}.weight has values outside -8..7")
        weight = mx.pack(weight)
    return weight, own


def _static(name: str, part: Part) -> tuple[torch.Tensor, Part]:
    """Codes and activation scales of static W8A8."""
    deq = _positive(name, "deq_scale", integers.deq_scale(part["deq_scale"]))
    scale = _positive(name, "input_scale", part["input_scale"].float().reshape(()))
    offset = part["input_offset"].float().reshape(())
    if not -128 <= float(offset) <= 127 or float(offset) != int(offset):
        raise ValueError(f"{name}.input_offset is {float(offset)}, expected a whole number from -128 to 127")
    return part["weight"], {"scale": deq, "input_scale": scale, "input_offset": offset}


def _bias_of_static(name: str, part: Part, codes: torch.Tensor, own: Part, wanted: bool) -> Part:
    """Complete `own` with quant_bias, and return the float bias for the host: one made from the other if need be.

    quant_bias = round(bias / deq_scale) - input_offset * (sum of a row's codes). An NPU adds quant_bias only.
    """
    sums = own["input_offset"].double() * codes.sum(1, dtype=torch.int64)
    deq = own["scale"][:, 0].double()
    floats = float_bias(name, part, wanted)
    stored = part.get("quant_bias")
    if stored is None:
        bias = floats["bias"].double() if floats else torch.zeros_like(deq)
        stored = ((bias / deq).round() - sums).round().to(torch.int32)
    elif wanted and not floats:
        floats = {"bias": ((stored + sums) * deq).float()}
    own["quant_bias"] = stored
    if floats:
        own["bias"] = floats["bias"]
    return floats


def _tiny_blocks(codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether MXFP8 blocks with byte 0 have codes other than zero."""
    if not bool((scale == 0).any()):
        return False
    return bool(((scale == 0) & (mx.split(codes.float(), BLOCK) != 0).any(-1)).any())


def _host(layout: str, data: torch.Tensor, scale: torch.Tensor) -> Part:
    """Weight and scale as the host's own layout stores them; MXFP8 padded to 32 x 32 with tiled scales."""
    if layout == "mxfp8":
        missing_rows, missing_columns = -data.shape[0] % BLOCK, -data.shape[1] % BLOCK
        if missing_rows or missing_columns:
            padding = (0, missing_columns, 0, missing_rows)
            data = torch.nn.functional.pad(data.view(torch.uint8), padding).view(mx.E4M3)
        return {"weight": data, "weight_scale": swizzle(scale).view(torch.float8_e8m0fnu)}
    return {"weight": data, "weight_scale": scale}


def dequantized(layer: NativeLayer) -> torch.Tensor:
    """See schemes.dequantized."""
    weight = layer.tensors["weight"]
    if not layer.kind:
        return weight.float()
    if layer.layout.startswith(MARKER):
        own: dict[str, Any] = {leaf: layer.tensors[f"weight_{leaf}"] for leaf in OWN_LEAVES
                               if f"weight_{leaf}" in layer.tensors}
        params = AscendLayout.Params(kind=layer.kind, orig_dtype=torch.float32,
                                     orig_shape=(layer.rows, layer.columns), **own)
        return decode(weight, params)
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    name = {"mxfp8": "TensorCoreMXFP8Layout", "int8_tensorwise": "TensorWiseINT8Layout"}[layer.layout]
    params = get_layout_class(name).Params(scale=layer.tensors["weight_scale"], orig_dtype=torch.float32,
                                           orig_shape=(layer.rows, layer.columns))
    found = as_ascend(QuantizedTensor(weight, name, params))
    assert found is not None
    return decode(*found)

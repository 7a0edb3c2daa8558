"""A layout of the host's quantized tensors for what ModelSlim writes and the host has no layout for.

Dequantizing is exact by the format's definition, so everything of the host that works on dequantized weights (LoRA,
other devices, saving) works. The multiply is not here: ops.py sends it to a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class

from . import integers, mx
from .int8 import is_int8
from .kinds import BLOCK, KINDS, LEVELS

NAME = "QTAscendLayout"


class AscendLayout(QuantizedLayout):
    """`_qdata` holds the codes [N, K] or [N, K / 2]; what they mean is `Params.kind` (kinds.KINDS)."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale`: F32 [N, groups] or U8 E8M0 [N, ceil(K / 32)]; for "w8a8" the deq_scale (weight x activation scale).

        `offset`: weight zero points [N, groups]. `dual`: F32 [N, ceil(K / 512)]. `mul`: F32 [K], what activations are
        multiplied by; it counts as part of the weight. For "w8a8": `input_scale` and `input_offset` F32 [],
        `quant_bias` I32 [N], and `bias`, the layer's bias at the time that quant_bias was made.
        """

        kind: str = ""
        offset: torch.Tensor | None = None
        dual: torch.Tensor | None = None
        mul: torch.Tensor | None = None
        input_scale: torch.Tensor | None = None
        input_offset: torch.Tensor | None = None
        quant_bias: torch.Tensor | None = None
        bias: torch.Tensor | None = None
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]

    @classmethod
    def quantize(cls, tensor: torch.Tensor, kind: str = "", keep: dict[str, Any] | None = None,
                 stochastic_rounding: int | None = 0, groups: int = 1, **_ignored: Any) -> tuple[torch.Tensor, Params]:
        """Quantize a patched weight [N, K] to `kind` again; `keep` are Params that stay, as `requantize_kwargs` says.

        Scales come from the new weight, rounding is stochastic with the host's seed.
        """
        codec, kept, seed = KINDS[kind].codec, dict(keep or {}), stochastic_rounding or 0
        weight = tensor.float()
        if kept.get("mul") is not None:
            weight = weight / kept["mul"]
        made: dict[str, Any] = {}
        if codec in ("int8", "int4"):
            codes, made["scale"] = integers.quantize_rows(weight, LEVELS[codec], groups, seed)
            if kind == "w8a8":
                made |= _static_bias(codes, made["scale"], kept)
            data = mx.pack(codes) if codec == "int4" else codes
        elif codec == "e4m3":
            made["scale"] = (weight.abs().amax(1, keepdim=True) / mx.E4M3_MAX).clamp(min=1e-30)
            values = mx.dither(weight / made["scale"], 3, -6, seed)
            data = values.clamp(-mx.E4M3_MAX, mx.E4M3_MAX).to(mx.E4M3)
        elif codec == "mxfp8":
            data, made["scale"] = mx.quantize(weight, seed)
        elif codec == "mxfp4":
            data, made["scale"] = mx.quantize_fp4(weight, seed=seed)
        else:
            data, made["scale"], made["dual"] = mx.quantize_dual(weight, seed)
        kept.pop("bias_in_codes", None)
        return data, cls.Params(kind=kind, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape), **(kept | made))

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        p = qtensor._params
        keep = {name: getattr(p, name) for name in ("mul", "input_scale", "input_offset", "bias")
                if getattr(p, name) is not None}
        if p.offset is not None:
            keep["offset"] = torch.zeros_like(p.offset)  # new codes are symmetric; the host copies field by field
        if p.kind == "w8a8":
            total = p.quant_bias + p.input_offset * qtensor._qdata.sum(1, dtype=torch.float32)
            keep["bias_in_codes"] = total * p.scale[:, 0]  # the layer's bias, as quant_bias holds it
        return {"kind": p.kind, "keep": keep, "groups": 1 if p.scale.dtype == torch.uint8 else p.scale.shape[1]}

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The weight [N, K] in `orig_dtype`: computed in F32, cast once."""
        return decode(qdata, params).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Key suffix -> tensor: weight, weight_scale, weight_mul, ..., as ops.py reads them back."""
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False  # linear() on these tensors dequantizes; ops.py multiplies


def _static_bias(codes: torch.Tensor, scale: torch.Tensor, kept: dict[str, Any]) -> dict[str, torch.Tensor]:
    """deq_scale and quant_bias of "w8a8" for new codes and weight scales [N, 1], from the bias in `kept`."""
    deq = scale * kept["input_scale"]
    total = kept["bias_in_codes"] / deq[:, 0] - kept["input_offset"] * codes.sum(1, dtype=torch.float32)
    return {"scale": deq, "quant_bias": total.round().to(torch.int32)}


def integer_codes(qdata: torch.Tensor, params: AscendLayout.Params) -> torch.Tensor:
    """The codes of an integer weight as I8 [N, K]."""
    return integers.unpack_int4(qdata) if KINDS[params.kind].codec == "int4" else qdata


def decode(qdata: torch.Tensor, params: AscendLayout.Params, *, smoothed: bool = True) -> torch.Tensor:
    """The weight in F32 [N, K] by definition; without the smoothing vector when not `smoothed`."""
    codec = KINDS[params.kind].codec
    if codec in ("int8", "int4"):
        scale = params.scale if params.input_scale is None else params.scale / params.input_scale
        weight = integers.dequantize_rows(integer_codes(qdata, params), scale, params.offset)
    elif codec == "e4m3":
        weight = qdata.float() * params.scale
    elif codec == "mxfp8":
        weight = mx.dequantize(qdata, params.scale)
    elif codec == "mxfp4":
        weight = mx.dequantize_fp4(qdata, params.scale)
    else:
        assert params.dual is not None
        weight = mx.dequantize_dual(qdata, params.scale, params.dual)
    return weight if params.mul is None or not smoothed else weight * params.mul


def as_ascend(weight: object) -> tuple[torch.Tensor, AscendLayout.Params] | None:
    """Codes and Params of a weight in this layout, or in the host's layouts of the same formats; else None."""
    if not isinstance(weight, QuantizedTensor) or getattr(weight._params, "transposed", False):  # not all layouts say
        return None
    data, p = weight._qdata, weight._params
    rows, columns = p.orig_shape
    common: dict[str, Any] = {"orig_dtype": p.orig_dtype, "orig_shape": p.orig_shape}
    if weight._layout_cls == NAME:
        return data, p
    if is_int8(weight) and not p.convrot:
        scale = p.scale.float().reshape(-1, 1).expand(rows, 1)
        return data, AscendLayout.Params(kind="w8a8_dynamic", scale=scale, **common)
    if weight._layout_cls == "TensorCoreMXFP8Layout":
        blocks = -(-columns // BLOCK)
        scale = from_blocked(p.scale.view(torch.uint8), data.shape[0], data.shape[1] // BLOCK)[:rows, :blocks]
        return data[:rows, :columns], AscendLayout.Params(kind="w8a8_mxfp8", scale=scale, **common)
    return None


register_layout_class(NAME, AscendLayout)

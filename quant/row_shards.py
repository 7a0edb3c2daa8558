"""A host tensor layout that keeps a fused weight as the row shards it was stored in.

ComfyUI fuses q, k, v (and FLUX's proj_mlp) into one Linear; its FP8 layout has one scale a weight. ModelOpt exports one
scale for each of q, k, v. Squeezing them under one scale costs up to 1.2 % of output error (specs/parity.md section 4),
and gluing the bytes costs a copy of most of the model. So each shard stays the view it was loaded as, with its own
scale: the activation is quantized once, and each shard is one GEMM.

It also carries what the host's FP8 layout has no way to say: an activation scale that is computed on the fly when the
checkpoint has none (the host's layout would take 1.0 and clip).

Deletable the day the host's FP8 layout takes a scale per row and dynamic activation scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from comfy_kitchen import dequantize_per_tensor_fp8, quantize_per_tensor_fp8
from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)

NAME = "QTRowShardsLayout"
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # specs/modelopt.md 5.3: beyond 464 a cast gives NaN, so clamp
logger = logging.getLogger(__name__)


class RowShardsLayout(QuantizedLayout):
    """Rows in up to four shards, each FP8 E4M3 with its own scale or a plain float tensor (scale 1).

    `_qdata` is the first shard, `Params.shard_1..3` are the others, `Params.scale` is F32 [shards]. As an activation
    it is a single FP8 shard.
    """

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`orig_shape` is [sum of rows, columns]; `transposed` marks a logical transpose of the whole weight."""

        shard_1: torch.Tensor | None = None
        shard_2: torch.Tensor | None = None
        shard_3: torch.Tensor | None = None
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]

    @classmethod
    def quantize(cls, tensor: torch.Tensor, scale: torch.Tensor | str | None = None,
                 shards: tuple[tuple[int, torch.dtype], ...] | None = None, stochastic_rounding: int = 0,
                 inplace_ops: bool = False, **_ignored: Any) -> tuple[torch.Tensor, Params]:
        """Quantize an activation (no `shards`) or re-quantize a patched weight shard by shard.

        Activation [M, K]: `scale` is the stored static scale, or None for amax/448 of this very tensor. Weight [N, K]:
        `shards` gives (rows, dtype) of each; new scales come from each shard's amax, by the host's own FP8 layout and
        its stochastic rounding.
        """
        orig: dict[str, Any] = {"orig_dtype": tensor.dtype, "orig_shape": tuple(tensor.shape)}
        if shards is None:
            if not isinstance(scale, torch.Tensor):
                scale = torch.amax(tensor.abs()).float() / E4M3_MAX
                # an all-zero input, and fp16's range: 1/scale must stay finite
                scale = scale.clamp(min=max(1e-30, 2 / torch.finfo(tensor.dtype).max))
            return quantize_per_tensor_fp8(tensor, scale, E4M3), cls.Params(scale=scale.float().reshape(1), **orig)
        host_fp8 = get_layout_class("TensorCoreFP8E4M3Layout")
        data, scales = [], []
        for part, (_, dtype) in zip(tensor.split([rows for rows, _ in shards]), shards, strict=True):
            if dtype == E4M3:
                qdata, params = host_fp8.quantize(part, scale="recalculate", stochastic_rounding=stochastic_rounding,
                                                  inplace_ops=inplace_ops)
                data.append(qdata)
                scales.append(params.scale.reshape(()))
            else:
                data.append(part.to(dtype))
                scales.append(torch.ones((), device=tensor.device))
        return data[0], cls.Params(scale=torch.stack(scales), **orig, **shard_fields(data))

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The weight [rows, columns] in `orig_dtype`: code x scale for each FP8 shard, a cast for a plain one."""
        data = list(_shards(qdata, params))
        rows = [shard.shape[0] for shard in data]
        out = torch.empty(sum(rows), qdata.shape[1], dtype=params.orig_dtype, device=qdata.device)
        for part, shard, scale in zip(out.split(rows), data, params.scale, strict=True):
            part.copy_(dequantize_per_tensor_fp8(shard, scale, params.orig_dtype) if shard.dtype == E4M3 else shard)
        return out

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (*_shards(qtensor._qdata, qtensor._params), qtensor._params.scale)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Key suffix → tensor, as ops.py reads them back: weight, weight_shard_1.., weight_scale."""
        tensors = {f"_shard_{i}" if i else "": shard for i, shard in enumerate(_shards(qdata, params))}
        return {**tensors, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"shards": tuple((s.shape[0], s.dtype) for s in _shards(qtensor._qdata, qtensor._params))}


def shard_fields(data: list[torch.Tensor]) -> dict[str, Any]:
    """The Params fields of all shards but the first."""
    return {f"shard_{i}": shard for i, shard in enumerate(data) if i}


def _shards(qdata: torch.Tensor, params: RowShardsLayout.Params) -> Iterator[torch.Tensor]:
    yield qdata
    for shard in (params.shard_1, params.shard_2, params.shard_3):
        if shard is not None:
            yield shard


def _fp8_linear(x: QuantizedTensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [M, K] times every shard, one FP8 GEMM each; None when a shard is not FP8 or the device has no such GEMM."""
    shards = list(_shards(weight._qdata, weight._params))
    if any(shard.dtype != E4M3 for shard in shards):
        return None
    biases = [None] * len(shards) if bias is None else bias.split([s.shape[0] for s in shards])
    scale_x, dtype = x._params.scale.reshape(()), x._params.orig_dtype
    qdata = x._qdata.contiguous()
    try:
        out = [scaled_mm_v2(qdata, shard.t(), scale_a=scale_x, scale_b=scale, bias=b, out_dtype=dtype)
               for shard, scale, b in zip(shards, weight._params.scale.unbind(), biases, strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        logger.debug("FP8 GEMM not possible (%s), multiplying dequantized", error)
        return None
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def _is_weight(tensor: object, transposed: bool) -> bool:
    return (isinstance(tensor, QuantizedTensor) and tensor._layout_cls == NAME
            and tensor._params.transposed is transposed)


@register_layout_op(torch.ops.aten.linear.default, RowShardsLayout)
def _linear(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    out = _fp8_linear(x, weight, bias) if _is_weight(x, False) and _is_weight(weight, False) else None
    return torch.nn.functional.linear(*dequantize_args((x, weight, bias))) if out is None else out


# Outside inference mode (torch.compile, training) linear arrives taken apart: t, then mm or addmm.
@register_layout_op(torch.ops.aten.t.default, RowShardsLayout)
def _t(_qt: object, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = args[0]._params
    flipped = replace(params, orig_shape=tuple(reversed(params.orig_shape)), transposed=not params.transposed)
    return QuantizedTensor(args[0]._qdata, NAME, flipped)


@register_layout_op(torch.ops.aten.mm.default, RowShardsLayout)
def _mm(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args[:2]
    out = _fp8_linear(x, weight, None) if _is_weight(x, False) and _is_weight(weight, True) else None
    return torch.mm(*dequantize_args((x, weight))) if out is None else out


@register_layout_op(torch.ops.aten.addmm.default, RowShardsLayout)
def _addmm(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, x, weight = args[:3]
    plain = not kwargs and _is_weight(x, False) and _is_weight(weight, True)
    out = _fp8_linear(x, weight, bias) if plain else None
    return torch.addmm(*dequantize_args((bias, x, weight)), **kwargs) if out is None else out


register_layout_class(NAME, RowShardsLayout)

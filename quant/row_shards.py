"""Host tensor layouts that keep a fused weight as the row shards it was stored in.

ComfyUI fuses q, k, v (and FLUX's proj_mlp) into one Linear; its FP8 and NVFP4 layouts have one tensor scale a weight.
ModelOpt exports one for each of q, k, v. Squeezing FP8 under one scale costs up to 1.2 % of output error
(docs/formats/row-shards.md), and gluing the bytes costs a copy of most of the model. So each shard stays the view it
was loaded as, with its own scale: the activation is quantized once, and each shard is one GEMM.

The FP8 layout also carries what the host's has no way to say: an activation scale that is computed on the fly when the
checkpoint has none (the host's layout would take 1.0 and clip).

Deletable the day the host's layouts take a scale per row and dynamic FP8 activation scales.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from comfy_kitchen import (
    dequantize_nvfp4,
    dequantize_per_tensor_fp8,
    quantize_per_tensor_fp8,
    scaled_mm_nvfp4,
)
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

from .exact import or_exact

FP8_NAME, NVFP4_NAME = "QTRowShardsFP8Layout", "QTRowShardsNVFP4Layout"
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # torch casts what is beyond 464 to NaN, so clamp


class RowShard(NamedTuple):
    """Rows of a weight: E4M3 [rows, columns] with a scale, U8 [rows, columns / 2] with a scale and swizzled block
    scales (NVFP4), or a plain float tensor."""

    data: torch.Tensor
    scale: torch.Tensor
    block: torch.Tensor | None

    @property
    def kind(self) -> str | torch.dtype:
        """What it is, as `requantize_kwargs` remembers it."""
        return "nvfp4" if self.block is not None else self.data.dtype

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Code x scale(s) in `dtype`; a cast for a plain shard."""
        if self.block is not None:
            return dequantize_nvfp4(self.data.contiguous(), self.scale, self.block, dtype)
        if self.data.dtype == E4M3:
            return dequantize_per_tensor_fp8(self.data, self.scale, dtype)
        return self.data.to(dtype)


class RowShardsLayout(QuantizedLayout):
    """Rows in up to four shards, each with its own scale, with FP8 activations.

    `_qdata` is the data of the first shard, `Params.shard_1..3` of the others; `Params.scale` is F32 [shards] (1 for a
    plain shard), `Params.block_0..3` are the block scales of NVFP4 shards. An activation is a single shard.
    """

    MIN_SM_VERSION = (8, 9)
    KIND, WHO = "FP8", "comfy-kitchen"  # what is multiplied, and by whom

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`orig_shape` is [sum of rows, columns]; `transposed` marks a logical transpose of the whole weight."""

        shard_1: torch.Tensor | None = None
        shard_2: torch.Tensor | None = None
        shard_3: torch.Tensor | None = None
        block_0: torch.Tensor | None = None
        block_1: torch.Tensor | None = None
        block_2: torch.Tensor | None = None
        block_3: torch.Tensor | None = None
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]

    @classmethod
    def quantize(cls, tensor: torch.Tensor, scale: torch.Tensor | str | None = None,
                 shards: tuple[tuple[int, Any], ...] | None = None, stochastic_rounding: int = 0,
                 inplace_ops: bool = False, **_ignored: Any) -> tuple[torch.Tensor, Params]:
        """Quantize an activation (no `shards`) or re-quantize a patched weight shard by shard.

        Activation [M, K]: `scale` is the stored static scale, or None for one from this very tensor's amax. Weight
        [N, K]: `shards` gives (rows, kind) of each; new scales come from each shard's amax, by the host's own layouts
        and their stochastic rounding.
        """
        orig: dict[str, Any] = {"orig_dtype": tensor.dtype, "orig_shape": tuple(tensor.shape)}
        if shards is None:
            return cls.quantize_activation(tensor, scale if isinstance(scale, torch.Tensor) else None, orig)
        data, scales = [], []
        blocks: list[torch.Tensor | None] = []
        for part, (_, kind) in zip(tensor.split([rows for rows, _ in shards]), shards, strict=True):
            host = {"nvfp4": "TensorCoreNVFP4Layout", E4M3: "TensorCoreFP8E4M3Layout"}.get(kind)
            if host is None:
                data.append(part.to(kind))
                scales.append(torch.ones((), device=tensor.device))
                blocks.append(None)
                continue
            qdata, params = get_layout_class(host).quantize(part, scale="recalculate", inplace_ops=inplace_ops,
                                                            stochastic_rounding=stochastic_rounding)
            data.append(qdata)
            scales.append(params.scale.reshape(()))
            blocks.append(getattr(params, "block_scale", None))
        return data[0], cls.Params(scale=torch.stack(scales), **orig, **shard_fields(data, blocks))

    @classmethod
    def quantize_activation(cls, tensor: torch.Tensor, scale: torch.Tensor | None,
                            orig: dict[str, Any]) -> tuple[torch.Tensor, Params]:
        """FP8: clamp(x / scale, +-448) as E4M3; without a scale amax / 448."""
        if scale is None:
            scale = torch.amax(tensor.abs()).float() / E4M3_MAX
            # an all-zero input, and fp16's range: 1/scale must stay finite
            scale = scale.clamp(min=max(1e-30, 2 / torch.finfo(tensor.dtype).max))
        return quantize_per_tensor_fp8(tensor, scale, E4M3), cls.Params(scale=scale.float().reshape(1), **orig)

    @classmethod
    def takes(cls, shard: RowShard) -> bool:
        """Whether `multiply` is for shards of this kind; others are multiplied dequantized."""
        return shard.data.dtype == E4M3

    @classmethod
    def multiply(cls, x: QuantizedTensor, shard: RowShard, bias: torch.Tensor | None) -> torch.Tensor:
        """One FP8 GEMM: x [M, K] times the shard's rows. Raises where the device has none."""
        return scaled_mm_v2(x._qdata.contiguous(), shard.data.t(), scale_a=x._params.scale.reshape(()),
                            scale_b=shard.scale, bias=bias, out_dtype=x._params.orig_dtype)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The weight [rows, columns] in `orig_dtype`, shard by shard."""
        parts = shards_of(qdata, params)
        if len(parts) == 1:
            return parts[0].dequantize(params.orig_dtype)
        rows, columns = (params.orig_shape[1], params.orig_shape[0]) if params.transposed else params.orig_shape
        out = torch.empty(rows, columns, dtype=params.orig_dtype, device=qdata.device)
        for part, shard in zip(out.split([s.data.shape[0] for s in parts]), parts, strict=True):
            part.copy_(shard.dequantize(params.orig_dtype))
        return out

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        parts = shards_of(qtensor._qdata, qtensor._params)
        return (*(s.data for s in parts), *(s.block for s in parts if s.block is not None), qtensor._params.scale)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Key suffix -> tensor, as ops.py reads them back: weight, weight_shard_1.., weight_block_0.., weight_scale."""
        tensors = {"_scale": params.scale}
        for i, shard in enumerate(shards_of(qdata, params)):
            tensors[f"_shard_{i}" if i else ""] = shard.data
            if shard.block is not None:
                tensors[f"_block_{i}"] = shard.block
        return tensors

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"shards": tuple((s.data.shape[0], s.kind) for s in shards_of(qtensor._qdata, qtensor._params))}


class NVFP4RowShardsLayout(RowShardsLayout):
    """Row shards that are all NVFP4, with NVFP4 activations."""

    MIN_SM_VERSION = (10, 0)
    KIND = "NVFP4"

    @classmethod
    def quantize_activation(cls, tensor: torch.Tensor, scale: torch.Tensor | None,
                            orig: dict[str, Any]) -> tuple[torch.Tensor, RowShardsLayout.Params]:
        """NVFP4 as the host quantizes activations; without a scale amax / 2688."""
        qdata, params = get_layout_class("TensorCoreNVFP4Layout").quantize(tensor, scale=scale)
        return qdata, cls.Params(scale=params.scale.reshape(1), block_0=params.block_scale, **orig)

    @classmethod
    def takes(cls, shard: RowShard) -> bool:
        return shard.block is not None

    @classmethod
    def multiply(cls, x: QuantizedTensor, shard: RowShard, bias: torch.Tensor | None) -> torch.Tensor:
        assert shard.block is not None
        out = scaled_mm_nvfp4(x._qdata, shard.data, tensor_scale_a=x._params.scale.reshape(()),
                              tensor_scale_b=shard.scale, block_scale_a=x._params.block_0, block_scale_b=shard.block,
                              bias=bias, out_dtype=x._params.orig_dtype)
        return out[:x._params.orig_shape[0]]


def shard_fields(data: list[torch.Tensor], blocks: list[torch.Tensor | None]) -> dict[str, Any]:
    """The Params fields of all shards: data of all but the first, and block scales."""
    return {f"shard_{i}": shard for i, shard in enumerate(data) if i} | {f"block_{i}": b for i, b in enumerate(blocks)}


def shards_of(qdata: torch.Tensor, params: RowShardsLayout.Params) -> list[RowShard]:
    """The shards of a weight, in row order."""
    data = [qdata, *(d for d in (params.shard_1, params.shard_2, params.shard_3) if d is not None)]
    blocks = (params.block_0, params.block_1, params.block_2, params.block_3)
    return [RowShard(d, s, b) for d, s, b in zip(data, params.scale.unbind(), blocks, strict=False)]


def _multiply(x: QuantizedTensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] times every shard, one GEMM each; a shard that no kernel takes is multiplied dequantized."""
    parts = shards_of(weight._qdata, weight._params)
    biases = [None] * len(parts) if bias is None else bias.split([s.data.shape[0] for s in parts])

    def one(shard: RowShard, own: torch.Tensor | None) -> torch.Tensor:
        layout = weight.layout_cls

        def exact() -> torch.Tensor:
            return torch.nn.functional.linear(x.dequantize(), shard.dequantize(x._params.orig_dtype), own)

        if not layout.takes(shard):
            return exact()
        return or_exact(lambda: layout.multiply(x, shard, own), exact, f"{layout.KIND} row shards by {layout.WHO}")

    out = [one(shard, b) for shard, b in zip(parts, biases, strict=True)]
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def _usable(x: object, weight: object, transposed: bool) -> bool:
    """Whether both are row-shard tensors of one layout, the weight transposed as the operation needs it."""
    return (isinstance(x, QuantizedTensor) and isinstance(weight, QuantizedTensor)
            and x._layout_cls == weight._layout_cls and issubclass(weight.layout_cls, RowShardsLayout)
            and not x._params.transposed and weight._params.transposed is transposed)


@register_layout_op(torch.ops.aten.linear.default, RowShardsLayout)
def _linear(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if _usable(x, weight, False):
        return _multiply(x, weight, bias)
    return torch.nn.functional.linear(*dequantize_args((x, weight, bias)))


# Outside inference mode (torch.compile, training) linear arrives taken apart: t, then mm or addmm.
@register_layout_op(torch.ops.aten.t.default, RowShardsLayout)
def _t(_qt: object, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = args[0]._params
    flipped = replace(params, orig_shape=tuple(reversed(params.orig_shape)), transposed=not params.transposed)
    return QuantizedTensor(args[0]._qdata, args[0]._layout_cls, flipped)


@register_layout_op(torch.ops.aten.mm.default, RowShardsLayout)
def _mm(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args[:2]
    return _multiply(x, weight, None) if _usable(x, weight, True) else torch.mm(*dequantize_args((x, weight)))


@register_layout_op(torch.ops.aten.addmm.default, RowShardsLayout)
def _addmm(_qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, x, weight = args[:3]
    if not kwargs and _usable(x, weight, True):
        return _multiply(x, weight, bias)
    return torch.addmm(*dequantize_args((bias, x, weight)), **kwargs)


register_layout_class(FP8_NAME, RowShardsLayout)
register_layout_class(NVFP4_NAME, NVFP4RowShardsLayout)

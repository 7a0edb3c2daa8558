"""The forward of a weight in SVDQuantLayout: every part by its back end, outputs on the same rows added, then bias.

Arithmetic of a W4A4 part (docs/sources/nunchaku.md, "Arithmetic"): the quantized activation of
(x [+ 0.171875]) / smooth times the codes, plus bias, plus the low-rank pair on raw x.

Activations (docs/sources/nunchaku.md, "Activation rules"). INT4: scale = absmax / 7 (unsigned: / 15) of 64
channels, codes from that scale, as nunchaku. NVFP4: block scale = amax / 6 as E4M3 with a tensor scale of 1 (nunchaku
has none), codes taken from the ROUNDED scale, which is the host kernel's rule; nunchaku's kernel takes them from the
unrounded one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, dequantize_args, get_layout_class, register_layout_op
from torch import Tensor
from torch.nn.functional import linear as matmul

from ..exact import or_exact
from .held import Held, natural
from .layout import SVDQuantLayout, held_parts, is_svdquant, plain_shift, residual

HALF = (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight of this layout, plus the stored bias [N]; in the dtype of x."""
    params = weight._params
    flat = x.reshape(-1, x.shape[-1])
    rows: dict[int, Tensor] = {}
    for held in sorted(held_parts(weight._qdata, params), key=lambda held: held.place[3:5]):
        p = held.place
        own = flat[:, p.column:p.column + p.columns] if p.columns != flat.shape[1] else flat
        first = p.row not in rows
        own_bias = bias[p.row:p.row + p.rows].to(x.dtype) if first and bias is not None else None
        out = multiply(own, held, params, own_bias)
        rows[p.row] = out if first else rows[p.row] + out
    out = next(iter(rows.values())) if len(rows) == 1 else torch.cat(list(rows.values()), 1)
    if params.delta is not None:
        out = out + matmul(flat, params.delta.to(x.dtype))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def multiply(x: Tensor, held: Held, params: SVDQuantLayout.Params, bias: Tensor | None) -> Tensor:
    """x [M, K] times one part, by the weight's back end."""
    kind = held.place.kind
    native: Callable[..., Tensor] | None = None
    who = "comfy-kitchen"
    if held.place.packed:
        from . import nunchaku_ops

        native, who = nunchaku_ops.multiply, "nunchaku"
    elif params.backend != "dequantize":
        if kind == "int4" and _int4_runs(x):
            native = _int4
        elif kind == "nvfp4" and params.native_fp4:
            native = _nvfp4
        elif kind == "awq" and x.is_cuda:
            native = _awq
    if native is None:
        return dense(x, held, bias)
    return or_exact(lambda: native(x, held, bias), lambda: dense(x, held, bias), f"SVDQuant {kind} by {who}")


def dense(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """The residual dequantized for this matmul, full-precision activations; the bias corrected by `plain_shift`."""
    weight = residual(natural(held))
    if held.place.unsigned:
        shift = plain_shift(weight)
        bias = (shift if bias is None else bias.float() + shift).to(x.dtype)
    return _add_low_rank(matmul(x, weight.to(x.dtype), bias), x, held)


def _add_low_rank(out: Tensor, x: Tensor, held: Held) -> Tensor:
    if held.down is None or held.up is None or not held.down.shape[1]:
        return out
    return torch.addmm(out, x @ held.down.to(x.dtype), held.up.to(x.dtype).t())


def _int4_runs(x: Tensor) -> bool:
    """comfy-kitchen calls its CUDA kernels past its own gate, and they trap before SM 8.0."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _int4(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """comfy-kitchen's own layout: CUDA (16 bit only), HIP, or eager anywhere."""
    dtype = x.dtype if x.dtype in HALF or not x.is_cuda else torch.bfloat16
    scale, smooth, down, up = (_as(t, dtype) for t in (held.scale, held.smooth, held.down, held.up))
    theirs = get_layout_class("TensorCoreSVDQuantW4A4Layout")
    params = theirs.Params(scale=scale, orig_dtype=dtype, orig_shape=(held.place.rows, held.place.columns),
                           proj_down=down, proj_up=up, smooth_factor=smooth, act_unsigned=held.place.unsigned)
    weight = QuantizedTensor(held.codes.view(torch.int8), "TensorCoreSVDQuantW4A4Layout", params)
    return matmul(x.to(dtype).contiguous(), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def _nvfp4(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """The host's NVFP4 GEMM on x / smooth, times the channel scales, then bias and the low-rank pair on raw x."""
    p = held.place
    assert held.smooth is not None and held.tensor_scale is not None
    theirs = get_layout_class("TensorCoreNVFP4Layout")
    params = theirs.Params(scale=held.tensor_scale, orig_dtype=x.dtype, orig_shape=(p.rows, p.columns),
                           block_scale=held.scale)
    weight = QuantizedTensor(held.codes, "TensorCoreNVFP4Layout", params)
    one = torch.ones((), device=x.device)
    act = QuantizedTensor.from_float((x / held.smooth.to(x.dtype)).contiguous(), "TensorCoreNVFP4Layout", scale=one)
    out = matmul(act, weight)
    if held.channel_scale is not None:
        out = out * held.channel_scale.to(x.dtype)
    return _add_low_rank(out if bias is None else out + bias, x, held)


def _awq(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """comfy-kitchen's AWQ kernels, which take any number of rows (16 bit only). They compute (q - 8) * s + z."""
    dtype = x.dtype if x.dtype in HALF else torch.bfloat16
    assert held.zeros is not None
    zeros = held.zeros.float() + 8 * held.scale.float()  # F32: in 16 bit it would be rounded twice
    theirs = get_layout_class("TensorCoreAWQW4A16Layout")
    params = theirs.Params(scale=_as(held.scale, dtype), zeros=_as(zeros, dtype), orig_dtype=dtype,
                           orig_shape=(held.place.rows, held.place.columns))
    weight = QuantizedTensor(held.codes.view(torch.int8), "TensorCoreAWQW4A16Layout", params)
    out = matmul(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    return _add_low_rank(out, x, held)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert tensor is not None
    return tensor.to(dtype)


# ------------------------------------------------- dispatch, as in row_shards.py

@register_layout_op(torch.ops.aten.linear.default, SVDQuantLayout)
def _linear(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not is_svdquant(weight) or weight._params.transposed:
        return matmul(*dequantize_args((x, weight, bias)))
    return linear(x.dequantize() if isinstance(x, QuantizedTensor) else x, weight, bias)


@register_layout_op(torch.ops.aten.t.default, SVDQuantLayout)
def _t(_qt: object, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = args[0]._params
    flipped = replace(params, orig_shape=tuple(reversed(params.orig_shape)), transposed=not params.transposed)
    return QuantizedTensor(args[0]._qdata, args[0]._layout_cls, flipped)


def _untransposed(x: Any, weight: Any) -> QuantizedTensor | None:
    """The weight W of x @ W.T, or None when this is no such product."""
    if isinstance(x, QuantizedTensor) or not is_svdquant(weight) or not weight._params.transposed:
        return None
    return _t(None, (weight,), {})


@register_layout_op(torch.ops.aten.mm.default, SVDQuantLayout)
def _mm(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    weight = _untransposed(*args[:2])
    return torch.mm(*dequantize_args(args)) if weight is None else linear(args[0], weight, None)


@register_layout_op(torch.ops.aten.addmm.default, SVDQuantLayout)
def _addmm(_qt: object, args: tuple, kwargs: dict) -> Tensor:
    weight = None if kwargs else _untransposed(*args[1:3])
    return torch.addmm(*dequantize_args(args), **kwargs) if weight is None else linear(args[1], weight, args[0])

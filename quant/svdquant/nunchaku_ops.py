"""Parts in nunchaku's own order, run by the kernels of the real nunchaku package.

Signatures: nunchaku.ops.quantize.svdq_quantize_w4a4_act_fuse_lora_cuda, nunchaku.ops.gemm.svdq_gemm_w4a4_cuda and
nunchaku.ops.gemv.awq_gemv_w4a16_cuda of nunchaku 1.0 to 1.2. Unsigned parts do not come here: the package's standalone
quantizer only emits signed codes (docs/sources/nunchaku.md, "Unsigned activations"), so they stay in natural order
with comfy-kitchen.

Packed tensors: codes I8 [N, K/2] and all W4A4 leaves as in a file, padded to 128 (rank to 16); AWQ codes I32 and zeros
in nunchaku's convention W = q * s + z. AWQ has no low-rank pair there, so that of a LoRA stays in natural order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .held import Held, padded_sizes

AWQ_ROWS = 8  # gemv_awq aborts the process above (docs/sources/nunchaku.md, "Hardware")












def multiply(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """x [M, K] times a packed part [N, K] plus bias [N], by nunchaku's kernels; on CUDA, in 16 bit."""
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    run = _awq if held.place.kind == "awq" else _w4a4
    out = run(x.to(dtype), held)
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def _w4a4(x: Tensor, held: Held) -> Tensor:
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    p, fp4 = held.place, held.place.kind == "nvfp4"
    n, k = padded_sizes(p)
    down, up, smooth, scale, channel = (None if t is None else t if t.dtype.itemsize == 1 else t.to(x.dtype)
                                        for t in (held.down, held.up, held.smooth, held.scale, held.channel_scale))
    act, ascales, lora_act = svdq_quantize_w4a4_act_fuse_lora_cuda(
        pad(x, (0, k - p.columns)).contiguous(), lora_down=down, smooth=smooth, fp4=fp4, pad_size=256)
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    svdq_gemm_w4a4_cuda(act=act, wgt=held.codes, out=out, ascales=ascales, wscales=scale, lora_act_in=lora_act,
                        lora_up=up, bias=None, fp4=fp4, alpha=p.alpha if fp4 else None, wcscales=channel,
                        act_unsigned=False)
    return out[:, :p.rows]


def _awq(x: Tensor, held: Held) -> Tensor:
    from nunchaku.ops.gemv import awq_gemv_w4a16_cuda

    assert held.zeros is not None
    p, scale, zeros = held.place, held.scale.to(x.dtype), held.zeros.to(x.dtype)
    out = torch.cat([awq_gemv_w4a16_cuda(in_feats=rows.contiguous(), kernel=held.codes, scaling_factors=scale,
                                         zeros=zeros, m=rows.shape[0], n=p.rows, k=p.columns, group_size=64)
                     for rows in x.split(AWQ_ROWS)])
    if held.down is None or held.up is None or not held.down.shape[1]:
        return out
    return torch.addmm(out, x @ held.down.to(x.dtype), held.up.to(x.dtype).t())

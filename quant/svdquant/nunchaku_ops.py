"""Parts in nunchaku's own order, run by the kernels of the real nunchaku package.

Signatures: nunchaku.ops.quantize.svdq_quantize_w4a4_act_fuse_lora_cuda, nunchaku.ops.gemm.svdq_gemm_w4a4_cuda and
nunchaku.ops.gemv.awq_gemv_w4a16_cuda of nunchaku 1.0 to 1.2. Unsigned parts do not come here: the package's standalone
quantizer only emits signed codes (specs/nunchaku.md section 5), so they stay in natural order with comfy-kitchen.

Packed tensors: codes I8 [N, K/2] and all W4A4 leaves as in a file, padded to 128 (rank to 16); AWQ codes I32 and zeros
in nunchaku's convention W = q * s + z. AWQ has no low-rank pair there, so that of a LoRA stays in natural order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..nvfp4 import ceil_to
from . import packing
from .layout import Held, natural
from .parts import FIELDS, Place

AWQ_ROWS = 8  # gemv_awq aborts the process above (section 10)


def padded_sizes(place: Place) -> tuple[int, int]:
    """Rows and columns of the packed tensors."""
    if place.kind == "awq":
        return place.rows, place.columns
    return ceil_to(place.rows, 128), ceil_to(place.columns, 128)


def packed(held: Held) -> Held:
    """A part in natural order -> packed, for the kernels. The inverse of `unpacked`, bit for bit."""
    part = natural(held)
    place = held.place._replace(packed=True)
    if part.kind == "awq":
        return held._replace(place=place, codes=packing.pack_awq(part.codes))
    assert part.smooth is not None and part.down is not None and part.up is not None
    n, k = padded_sizes(place)
    rows, columns = n - part.rows, k - part.columns
    fields = {"codes": packing.pack_qweight(pad(part.codes, (0, columns // 2, 0, rows))),
              "smooth": packing.pack_vector(pad(part.smooth, (0, columns), value=1.0)),
              # F32 in what a model computing in F32 has saved with a LoRA
              **_packed_pair(part.down.to(part.smooth.dtype), part.up.to(part.smooth.dtype), place)}
    if part.kind == "int4":
        fields["scale"] = packing.pack_scales(pad(part.scale, (0, rows, 0, columns // 64)))
    else:
        scale = pad(part.scale.view(torch.uint8), (0, columns // 16, 0, rows)).view(part.scale.dtype)
        fields["scale"] = packing.pack_micro_scales(scale)
        ones = torch.ones(part.rows, dtype=part.smooth.dtype)
        channel = ones if part.channel_scale is None else part.channel_scale
        fields["channel_scale"] = packing.pack_vector(pad(channel, (0, rows)))
        assert part.tensor_scale is not None
        place = place._replace(alpha=float(part.tensor_scale))
    return held._replace(place=place, **fields)


def _packed_pair(down: Tensor, up: Tensor, place: Place) -> dict[str, Tensor]:
    """A low-rank pair in natural order -> packed, padded to whole ranks of 16."""
    n, k = padded_sizes(place)
    rank = -down.shape[1] % 16
    return {"down": packing.pack_down(pad(down, (0, rank, 0, k - place.columns))),
            "up": packing.pack_up(pad(up, (0, rank, 0, n - place.rows)))}


def unpacked(held: Held) -> dict[str, Tensor | None]:
    """The fields of a packed part in natural order, cropped to its rows and columns."""
    p = held.place
    fields: dict[str, Tensor | None] = {field: getattr(held, field) for field in FIELDS}
    if p.kind == "awq":
        return fields | {"codes": packing.unpack_awq(held.codes)}
    assert held.smooth is not None and held.down is not None and held.up is not None
    fields |= {"codes": packing.unpack_qweight(held.codes)[:p.rows, :p.columns // 2].contiguous(),
               "smooth": packing.unpack_vector(held.smooth)[:p.columns].contiguous(),
               "down": packing.unpack_down(held.down)[:p.columns].contiguous(),
               "up": packing.unpack_up(held.up)[:p.rows].contiguous()}
    if p.kind == "int4":
        return fields | {"scale": packing.unpack_scales(held.scale)[:p.columns // 64, :p.rows].contiguous()}
    assert held.channel_scale is not None
    scale = packing.unpack_micro_scales(held.scale).view(torch.uint8)[:p.rows, :p.columns // 16].contiguous()
    return fields | {"scale": scale.view(held.scale.dtype),
                     "channel_scale": packing.unpack_vector(held.channel_scale)[:p.rows].contiguous()}


def append(held: Held, downs: list[Tensor], ups: list[Tensor]) -> Held:
    """A packed part with further low-rank pairs (natural order) behind its own; in 16 bit, as the kernels need it."""
    assert held.down is not None and held.up is not None
    p, dtype = held.place, held.down.dtype
    if p.kind == "awq":
        return held._replace(down=torch.cat([held.down, *downs], 1), up=torch.cat([held.up, *ups], 1))
    own = packing.unpack_down(held.down)[:p.columns], packing.unpack_up(held.up)[:p.rows]
    down, up = (torch.cat([t, *(one.to(dtype) for one in more)], 1) for t, more in zip(own, (downs, ups), strict=True))
    pair = _packed_pair(down, up, p)
    return held._replace(down=pair["down"], up=pair["up"])


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

"""Parts in nunchaku's own order, run by the kernels of the real nunchaku package.

Signatures: nunchaku.ops.quantize.svdq_quantize_w4a4_act_fuse_lora_cuda, nunchaku.ops.gemm.svdq_gemm_w4a4_cuda and
nunchaku.ops.gemv.awq_gemv_w4a16_cuda of nunchaku 1.0 to 1.2. Unsigned parts do not come here: the package's standalone
quantizer only emits signed codes (docs/sources/nunchaku.md, "Unsigned activations"), so they stay in natural order
with comfy-kitchen.

Packed tensors: codes I8 [N, K/2] and all W4A4 leaves as in a file, padded to 128 (rank to 16); AWQ codes I32 and zeros
in nunchaku's convention W = q * s + z. AWQ has no low-rank pair there, so that of a LoRA stays in natural order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...host.texts import Text
from ..codecs import codec
from ..svdquant.packed import ORDER, packed, padded_sizes
from ..svdquant.parts import KIND
from ..tile import Tile
from . import nunchaku_wheel
from .base import HALF, NATIVE, Activation, Kernel, Speed, add_low_rank
from .comfy_kitchen import KERNEL as KITCHEN

if TYPE_CHECKING:
    from ...host import Machine

AWQ_ROWS = 8  # gemv_awq aborts the process above (docs/sources/nunchaku.md, "Hardware")


class Nunchaku(Kernel):
    """See the module. What has no order of nunchaku's is comfy-kitchen's."""

    name, title = ORDER, "nunchaku"
    codecs = frozenset(KIND)
    whole_file = True

    def probe(self, machine: Machine) -> nunchaku_wheel.Wheel:
        return nunchaku_wheel.find()

    def runs(self, name: str, machine: Machine) -> str:
        return nunchaku_wheel.gate({KIND[name]}, machine.capability) or machine.found[self.name].problem

    def speed(self, name: str, machine: Machine) -> Speed:
        if machine.capability == (7, 5):
            return Speed(NATIVE, Text("nunchaku's kernels: fast; FP16 only (BF16 kernels assert on Turing)"))
        return Speed(NATIVE, Text("nunchaku's kernels: fast"))

    def warning(self, machine: Machine) -> str:
        wheel = machine.found[self.name]  # one of this name that is not the engine
        return wheel.problem if wheel.version and wheel.problem else ""

    def ordered(self, tile: Tile) -> Tile:
        if tile.place.order or not codec(tile.place.codec).orders:
            return tile
        return packed(tile)

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        """On CUDA, in 16 bit."""
        if not tile.place.order:
            return KITCHEN.linear(act, tile, bias)
        x = act.x
        dtype = x.dtype if x.dtype in HALF else torch.bfloat16
        run = _awq if KIND[tile.place.codec] == "awq" else _w4a4
        out = run(x.to(dtype), tile)
        return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def _w4a4(x: Tensor, tile: Tile) -> Tensor:
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    p, fp4 = tile.place, KIND[tile.place.codec] == "nvfp4"
    n, k = padded_sizes(p)
    down, up, smooth, scale, channel = (None if t is None else t if t.dtype.itemsize == 1 else t.to(x.dtype) for t in
                                        map(tile.get, ("down", "up", "smooth", "scale", "channel_scale")))
    act, ascales, lora_act = svdq_quantize_w4a4_act_fuse_lora_cuda(
        pad(x, (0, k - p.columns)).contiguous(), lora_down=down, smooth=smooth, fp4=fp4, pad_size=256)
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    svdq_gemm_w4a4_cuda(act=act, wgt=tile["codes"], out=out, ascales=ascales, wscales=scale, lora_act_in=lora_act,
                        lora_up=up, bias=None, fp4=fp4, alpha=p.number if fp4 else None, wcscales=channel,
                        act_unsigned=False)
    return out[:, :p.rows]


def _awq(x: Tensor, tile: Tile) -> Tensor:
    from nunchaku.ops.gemv import awq_gemv_w4a16_cuda

    p, scale, zeros = tile.place, tile["scale"].to(x.dtype), tile["zeros"].to(x.dtype)
    out = torch.cat([awq_gemv_w4a16_cuda(in_feats=rows.contiguous(), kernel=tile["codes"], scaling_factors=scale,
                                         zeros=zeros, m=rows.shape[0], n=p.rows, k=p.columns, group_size=64)
                     for rows in x.split(AWQ_ROWS)])
    return add_low_rank(out, x, tile)


KERNEL = Nunchaku()


def get(variant: str) -> Kernel:
    """The kernel; it has no variants."""
    return KERNEL

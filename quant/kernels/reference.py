"""Ascend's arithmetic in plain torch, for any device: the numbers of an NPU bit by bit, as far as its rules are known.

Known (CANN's kernel sources; formulas in docs/sources/ascend.md): how activations are quantized, the integer sums,
the order of scales and bias. Not known: the order in which an NPU sums floating-point products (MX kinds: equal up to
F32 rounding), and its FP8 a token rule (taken to be that of INT8). For FP16 outputs of static W8A8 an NPU cuts
deq_scale to 10 mantissa bits (2^-10 relative); this does not. F32 activations are quantized as they are; SGLang, and
torch_npu.py, round them to BF16 first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...host.texts import Text
from ..ascend import integers, mx
from ..ascend.kinds import KINDS, LEVELS
from ..ascend.weights import decode, integer_codes
from ..tile import Tile
from . import by_tiles
from .base import SLOW, USABLE, Activation, Kernel, Speed, add_low_rank, dense

if TYPE_CHECKING:
    from ...host import Machine

AT_ONCE = 1024  # rows of 4-bit codes that are taken apart at once on a CPU
Matmul = Callable[[Tensor, Tensor], Tensor]  # I8 [M, K], I8 [K, N] -> I32 [M, N]


def smooth(x: Tensor, tile: Tile) -> Tensor:
    """x times the smoothing vector, in x's dtype, if the layer has one."""
    mul = tile.get("mul")
    return x if mul is None else x * mul.to(x.dtype)


def integer_linear(x: Tensor, tile: Tile, bias: Tensor | None, matmul: Matmul) -> Tensor:
    """x [M, K] times a tile of an integer kind, by an NPU's rules and this integer matmul."""
    static = KINDS[tile.place.codec].activation == "static"
    out = (static_linear if static else token_linear)(x, tile, bias, matmul)
    return add_low_rank(out, x, tile)


def static_linear(x: Tensor, tile: Tile, bias: Tensor | None, matmul: Matmul) -> Tensor:
    """W8A8: (codes of x @ weight + quant_bias) * deq_scale. quant_bias holds the layer's bias; what a patch has
    changed of it since (`bias` - the tile's) is added on top."""
    codes = integers.static(smooth(x, tile), tile["input_scale"], tile["input_offset"])
    total = matmul(codes, tile["codes"].t()) + tile["quant_bias"]
    return (total.float() * tile["scale"][:, 0] + patched_bias(tile, bias)).to(x.dtype)


def patched_bias(tile: Tile, bias: Tensor | None) -> Tensor | float:
    """What a patch added to the bias that quant_bias was made from, F32 [N]."""
    own = tile.get("bias")
    if bias is None or own is None:
        return 0.0 if bias is None else bias.float()
    return bias.float() - own.to(bias.dtype).float()


def token_linear(x: Tensor, tile: Tile, bias: Tensor | None, matmul: Matmul) -> Tensor:
    """INT8 and INT4 activations, one scale a token: sums * weight scale * token scale + bias, in F32, rounded once."""
    q, token = integers.per_token(smooth(x, tile), LEVELS[KINDS[tile.place.codec].activation])
    rows, scale = tile.place.rows, tile["scale"]
    step = AT_ONCE if x.device.type == "cpu" else max(rows, 1)
    made = []
    for codes, scales in zip(tile["codes"].split(step), scale.split(step), strict=True):
        weight = integer_codes(tile.having(codes=codes))
        size = weight.shape[1] // scale.shape[1]
        made.append(sum(matmul(a, w.t()).float() * scales[:, i].float()
                        for i, (a, w) in enumerate(zip(q.split(size, 1), weight.split(size, 1), strict=True))))
    out = (made[0] if len(made) == 1 else torch.cat(made, 1)) * token[:, None]
    return (out if bias is None else out + bias.float()).to(x.dtype)


def fp8_activation(x: Tensor) -> Tensor:
    """x through E4M3 with one scale a token, amax / 448, and back: F32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    scaled = (x * (torch.full_like(amax, mx.E4M3_MAX) / amax)).nan_to_num(0.0)
    codes = scaled.clamp(-mx.E4M3_MAX, mx.E4M3_MAX).to(mx.E4M3)
    return codes.float() * (amax * (1 / mx.E4M3_MAX))


# Activation rule -> x as the matmul sees it, F32
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "e4m3": fp8_activation,
    "mxfp8": lambda x: mx.dequantize(*mx.quantize(x)),
    "mxfp4": lambda x: mx.dequantize_fp4(*mx.quantize_fp4(x, half_away=True)),
    "mxfp4_dual": lambda x: mx.dequantize_dual(*mx.quantize_dual(x)),
}


class Reference(Kernel):
    """See the module."""

    name, title, takes_host_layouts = "reference", "reference", True
    codecs = frozenset(KINDS)

    def speed(self, name: str, machine: Machine) -> Speed:
        return Speed(USABLE if machine.kind == "npu" else SLOW,
                     Text("plain torch with the NPU's arithmetic: exact, and slow"))

    def decodes(self, name: str, like: Tensor) -> bool:
        return name in KINDS and not KINDS[name].activation

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        x, kind = act.x, KINDS.get(tile.place.codec)
        if kind is None or not kind.activation:
            return dense(x, tile, bias)
        if kind.integer:
            return integer_linear(x, tile, bias, integers.matmul)
        seen = ACTIVATIONS[kind.activation](smooth(x, tile))
        if by_tiles.takes(seen):
            plain = by_tiles.linear(seen, (tile.having(mul=None),), bias)
            return add_low_rank(plain.to(x.dtype), x, tile)
        out = seen @ decode(tile, smoothed=False).t()
        return add_low_rank((out if bias is None else out + bias.float()).to(x.dtype), x, tile)


KERNEL = Reference()


def get(variant: str) -> Kernel:
    """The kernel; it has no variants."""
    return KERNEL

"""Ascend's arithmetic in plain torch, for any device: the numbers of an NPU bit by bit, as far as its rules are known.

Known (CANN's kernel sources; formulas in docs/sources/ascend.md): how activations are quantized, the integer sums,
the order of scales and bias. Not known: the order in which an NPU sums floating-point products (MX kinds: equal up to
F32 rounding), and its FP8 a token rule (taken to be that of INT8). For FP16 outputs of static W8A8 an NPU cuts
deq_scale to 10 mantissa bits (2^-10 relative); this does not. F32 activations are quantized as they are; SGLang, and
torch_npu.py, round them to BF16 first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import integers, mx
from ..kinds import KINDS, LEVELS
from ..layout import AscendLayout, decode, integer_codes

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # I8 [M, K], I8 [K, N] -> I32 [M, N]


def smooth(x: torch.Tensor, params: AscendLayout.Params) -> torch.Tensor:
    """x times the smoothing vector, in x's dtype, if the layer has one."""
    return x if params.mul is None else x * params.mul.to(x.dtype)


def static_linear(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params, bias: torch.Tensor | None,
                  matmul: Matmul) -> torch.Tensor:
    """W8A8: (codes of x @ weight + quant_bias) * deq_scale. quant_bias holds the layer's bias; what a patch has
    changed of it since (`bias` - params.bias) is added on top."""
    assert p.input_scale is not None and p.input_offset is not None and p.quant_bias is not None
    total = matmul(integers.static(smooth(x, p), p.input_scale, p.input_offset), codes.t()) + p.quant_bias
    return (total.float() * p.scale[:, 0] + patched_bias(p, bias)).to(x.dtype)


def patched_bias(p: AscendLayout.Params, bias: torch.Tensor | None) -> torch.Tensor | float:
    """What a patch added to the bias that quant_bias was made from, F32 [N]."""
    if bias is None or p.bias is None:
        return 0.0 if bias is None else bias.float()
    return bias.float() - p.bias.to(bias.dtype).float()


def token_linear(x: torch.Tensor, codes: torch.Tensor, p: AscendLayout.Params, bias: torch.Tensor | None,
                 matmul: Matmul) -> torch.Tensor:
    """INT8 and INT4 activations, one scale a token: sums * weight scale * token scale + bias, in F32, rounded once."""
    q, token = integers.per_token(smooth(x, p), LEVELS[KINDS[p.kind].activation])
    weight, groups = integer_codes(codes, p), p.scale.shape[1]
    size = weight.shape[1] // groups
    out = sum(matmul(a, w.t()).float() * p.scale[:, i].float()
              for i, (a, w) in enumerate(zip(q.split(size, 1), weight.split(size, 1), strict=True)))
    out = out * token[:, None]
    return (out if bias is None else out + bias.float()).to(x.dtype)


def fp8_activation(x: torch.Tensor) -> torch.Tensor:
    """x through E4M3 with one scale a token, amax / 448, and back: F32."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    scaled = (x * (torch.full_like(amax, mx.E4M3_MAX) / amax)).nan_to_num(0.0)
    codes = scaled.clamp(-mx.E4M3_MAX, mx.E4M3_MAX).to(mx.E4M3)
    return codes.float() * (amax * (1 / mx.E4M3_MAX))


# Activation rule -> x as the matmul sees it, F32
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "e4m3": fp8_activation,
    "mxfp8": lambda x: mx.dequantize(*mx.quantize(x)),
    "mxfp4": lambda x: mx.dequantize_fp4(*mx.quantize_fp4(x, half_away=True)),
    "mxfp4_dual": lambda x: mx.dequantize_dual(*mx.quantize_dual(x)),
}


class Reference:
    """See the module."""

    name = "reference"
    takes_host_layouts = True
    matmul = staticmethod(integers.matmul)

    def linear(self, x: torch.Tensor, codes: torch.Tensor, params: AscendLayout.Params,
               bias: torch.Tensor | None) -> torch.Tensor:
        """See backends.Backend."""
        activation = KINDS[params.kind].activation
        if activation == "static":
            return static_linear(x, codes, params, bias, self.matmul)
        if KINDS[params.kind].integer:
            return token_linear(x, codes, params, bias, self.matmul)
        if not activation:
            return self.weight_only(x, codes, params, bias)
        seen = ACTIVATIONS[activation](smooth(x, params))
        out = seen @ decode(codes, params, smoothed=False).t()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    @staticmethod
    def weight_only(x: torch.Tensor, codes: torch.Tensor, params: AscendLayout.Params,
                    bias: torch.Tensor | None) -> torch.Tensor:
        """x times the dequantized weight, in x's dtype."""
        return torch.nn.functional.linear(x, decode(codes, params).to(x.dtype), bias)


BACKEND = Reference()

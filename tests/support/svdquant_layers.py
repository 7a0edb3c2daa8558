"""One layer as Nunchaku stores it: quantized here by SVD and rounding, packed by svdquant.py, and its numbers in natural
order. Nothing here uses the pack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support import svdquant
from support.common import E2M1

SHIFT = 0.171875  # docs/sources/nunchaku.md, "Unsigned activations"


@dataclass(frozen=True)
class Natural:
    """One stored layer as numbers, F32 (every value fits the dtype it is stored in).

    y = quant((x + shift) / smooth) @ residual.T + (x @ down.T) @ up.T + bias; AWQ: y = x @ residual.T + bias.
    """

    residual: Tensor  # [N, K], codes times scales
    bias: Tensor  # as stored, less the folded 1 of modulations
    smooth: Tensor | None = None
    down: Tensor | None = None  # [R, K]
    up: Tensor | None = None  # [N, R]
    unsigned: bool = False

    @property
    def weight(self) -> Tensor:
        """The plain weight that it stands for (docs/sources/nunchaku.md, "Arithmetic")."""
        if self.smooth is None or self.up is None or self.down is None:
            return self.residual
        return self.residual / self.smooth + self.up @ self.down

    @property
    def plain_bias(self) -> Tensor:
        """The bias beside `weight`, for a plain Linear (docs/sources/nunchaku.md, "Unsigned activations")."""
        if not self.unsigned or self.smooth is None:
            return self.bias
        return self.bias + SHIFT * (self.residual / self.smooth).sum(1)

    def rows(self, first: int, count: int) -> Natural:
        cut = slice(first, first + count)
        return Natural(self.residual[cut], self.bias[cut], self.smooth, self.down,
                       None if self.up is None else self.up[cut], self.unsigned)

    def forward(self, x: Tensor) -> Tensor:
        """The W4A4 arithmetic of docs/sources/nunchaku.md, int4; AWQ layers have 16-bit activations."""
        if self.smooth is None or self.up is None or self.down is None:
            return x @ self.residual.T + self.bias
        q = fake_int4((x + SHIFT if self.unsigned else x) / self.smooth, self.unsigned)
        return q @ self.residual.T + (x @ self.down.T) @ self.up.T + self.bias


def fake_int4(x: Tensor, unsigned: bool) -> Tensor:
    """Activations through int4 and back: a scale for each row and 64 channels."""
    groups = x.unflatten(-1, (-1, 64))
    top = 15 if unsigned else 7
    scale = groups.abs().amax(-1, keepdim=True) / top
    codes = (groups / torch.where(scale == 0, 1, scale)).round().clamp(0 if unsigned else -7, top)
    return (codes * scale).flatten(-2)


def _half(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def w4a4(weight: Tensor, bias: Tensor, precision: str, rank: int, unsigned: bool, parts: int, g: torch.Generator
         ) -> tuple[Natural, dict[str, Tensor]]:
    """Quantize a [N, K] weight of `parts` joined Linears: (its numbers, its packed leaves by v2 names)."""
    weight, bias = weight.float(), bias.float()
    rows, columns = weight.shape
    smooth = _half(torch.rand(columns, generator=g) + 0.5)
    u, s, v = torch.svd_lowrank(weight * smooth.float(), q=rank, niter=1)
    up, down = _half(u * s), _half(v.T / smooth.float())
    rest = weight * smooth.float() - up.float() @ (down.float() * smooth.float())
    leaves = {"smooth_factor": svdquant.pack_vector(smooth), "smooth_factor_orig": svdquant.pack_vector(smooth * 3),
              "proj_down": svdquant.pack_down(down.T.contiguous()), "proj_up": svdquant.pack_up(up)}
    if precision == "int4":
        groups = rest.view(rows, -1, 64)
        scale = _half(groups.abs().amax(-1) / 7)
        codes = (groups / scale.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
        residual = (codes * scale.float()[..., None]).view(rows, columns)
        leaves |= {"qweight": svdquant.pack_codes(codes.view(rows, columns).view(torch.uint8) & 15),
                   "wscales": svdquant.pack_scales(scale.T.contiguous())}
    else:
        groups = rest.view(parts, rows // parts, -1, 16)
        top = _half(groups.abs().amax((1, 2, 3)) / 6 / 448)
        channel = top.float()[:, None, None].expand(parts, rows // parts, 1).reshape(rows, 1)
        blocks = rest.view(rows, -1, 16)
        scale = (blocks.abs().amax(-1) / 6 / channel).to(torch.float8_e4m3fn)
        total = torch.where(scale.float() == 0, 1, scale.float())[..., None] * channel[..., None]
        scaled = blocks / total
        codes = torch.bucketize(scaled.abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])) + 8 * (scaled < 0)
        residual = (E2M1[codes] * scale.float()[..., None]).view(rows, columns) * channel
        leaves |= {"qweight": svdquant.pack_codes(codes.view(rows, columns).to(torch.uint8)),
                   "wscales": svdquant.pack_micro(scale)}
        leaves |= {"wcscales": svdquant.pack_vector(_half(channel.view(-1)))} if parts > 1 else {"wtscale": top}
    unsigned = unsigned and precision == "int4"
    if unsigned:  # the quantizer's own correction, on the float residual
        bias = bias - SHIFT * (weight - up.float() @ down.float()).sum(1)
    leaves["bias"] = svdquant.pack_vector(_half(bias))
    return Natural(residual, _half(bias).float(), smooth.float(), down.float(), up.float(), unsigned), leaves


def awq(weight: Tensor, bias: Tensor, vectors: int) -> tuple[Natural, dict[str, Tensor]]:
    """Quantize a modulation [S * D, K] as deepcompressor does: rows interleaved [D, S], 1 folded into the scales' biases
    (docs/formats/awq-w4a16.md; docs/sources/nunchaku.md, "Modulation"). 0 vectors: as nunchaku_lite has it, in natural
    order, its groups without padding."""
    weight, bias = weight.float(), bias.float().clone()
    rows, columns = weight.shape
    groups = weight.view(rows, -1, 64)
    low = groups.amin(-1)
    scale, zero = _half((groups.amax(-1) - low) / 15), _half(low)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    residual = (codes * scale.float()[..., None] + zero.float()[..., None]).view(rows, columns)
    if not vectors:
        return Natural(residual, _half(bias).float()), {
            "qweight": svdquant.pack_awq(codes.view(rows, columns).to(torch.uint8)), "wscales": scale.T.contiguous(),
            "wzeros": zero.T.contiguous(), "bias": _half(bias)}
    one = torch.zeros(vectors, rows // vectors)
    one[sorted({1, vectors - 2})] = 1
    folded = _half(bias + one.view(-1))

    def interleave(tensor: Tensor) -> Tensor:
        return tensor.view(vectors, rows // vectors, -1).transpose(0, 1).reshape(rows, -1)

    def padded(tensor: Tensor) -> Tensor:
        out = torch.zeros(-(-tensor.shape[1] // 16) * 16, rows, dtype=tensor.dtype)
        out[:tensor.shape[1]] = interleave(tensor).T
        return out

    leaves = {"qweight": svdquant.pack_awq(interleave(codes.view(rows, columns)).to(torch.uint8)), "wscales": padded(scale),
              "wzeros": padded(zero), "bias": interleave(folded).view(-1).contiguous()}
    return Natural(residual, folded.float() - one.view(-1)), leaves

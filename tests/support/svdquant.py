"""Nunchaku layers for tests: random ones, packed by the closed-form index formulas of
docs/sources/nunchaku.md, "Packing", and their arithmetic there in F32. Nothing here comes from the pack's unpackers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from support.common import E2M1

SHIFT = 0.171875


def up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    out = torch.zeros(shape, dtype=tensor.dtype)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def place(values: torch.Tensor, flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """values[i] to the flat memory index flat[i] of a tensor of this shape."""
    raw = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
    out = torch.empty(raw.numel(), dtype=raw.dtype)
    out[flat.reshape(-1)] = raw.reshape(-1)
    return out.view(values.dtype).view(shape)


def take(packed: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """What lies at the flat memory indices, in their shape: `place` the other way."""
    raw = packed.contiguous().view(torch.uint8) if packed.dtype == torch.float8_e4m3fn else packed
    return raw.reshape(-1)[flat].view(packed.dtype)


def at_codes(first: int, rows: int, columns: int) -> torch.Tensor:
    """Nibble index [rows, columns] of rows first.. of a qweight with this many columns."""
    n, k = torch.arange(first, first + rows)[:, None], torch.arange(columns)[None]
    word = ((n // 128) * (columns // 64) + k // 64) * 8 + (n % 128) // 16
    word = word * 32 + (n % 8) * 4 + (k % 32) // 8
    word = word * 4 + ((n % 16) // 8) * 2 + (k % 64) // 32
    return word * 8 + k % 8


def at_scales(groups: int, channels: int) -> torch.Tensor:
    """Index [G, N] of 16-bit scales; G = 1 for vectors."""
    g, n = torch.arange(groups)[:, None], torch.arange(channels)[None]
    return ((n // 128) * groups + g) * 128 + ((n % 128) // 16) * 16 + ((n % 8) // 2) * 4 + ((n % 16) // 8) * 2 + n % 2


def at_micro(rows: int, groups: int) -> torch.Tensor:
    """Index [N, K/16] of E4M3 scales."""
    n, c = torch.arange(rows)[:, None], torch.arange(groups)[None]
    flat = ((n // 128) * (groups // 4) + c // 4) * 8 + n % 8
    return ((flat * 4 + (n % 32) // 8) * 4 + (n % 128) // 32) * 4 + c % 4


def at_down(columns: int, rank: int) -> torch.Tensor:
    """Index [K, R] of proj_down."""
    k, r = torch.arange(columns)[:, None], torch.arange(rank)[None]
    return ((((k // 16) * (rank // 16) + r // 16) * 8 + r % 8) * 4 + (k % 8) // 2) * 8 \
        + ((r % 16) // 8) * 4 + ((k % 16) // 8) * 2 + k % 2


def at_up(rows: int, rank: int) -> torch.Tensor:
    """Index [N, R] of proj_up."""
    n, r = torch.arange(rows)[:, None], torch.arange(rank)[None]
    return ((((n // 16) * (rank // 16) + r // 16) * 8 + n % 8) * 4 + (r % 8) // 2) * 8 \
        + ((n % 16) // 8) * 4 + ((r % 16) // 8) * 2 + r % 2


def at_awq(rows: int, columns: int) -> torch.Tensor:
    """Nibble index [N, K] of an AWQ qweight."""
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    word = ((n // 4) * (columns // 64) + k // 64) * 64 + (n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8
    return word * 4 + (k % 32) // 8


def bytes_of(nibbles: torch.Tensor) -> torch.Tensor:
    return nibbles[0::2] | nibbles[1::2] << 4


def nibbles_of(packed: torch.Tensor) -> torch.Tensor:
    raw = packed.contiguous().view(torch.uint8).reshape(-1)
    return torch.stack([raw & 15, raw >> 4], -1).reshape(-1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles [N, K] (0..15, padded sizes) -> I8 [N, K/2]; 128 rows at a time to bound memory."""
    rows, columns = codes.shape
    nibbles = torch.empty(rows * columns, dtype=torch.uint8)
    for start in range(0, rows, 128):
        nibbles[at_codes(start, 128, columns).reshape(-1)] = codes[start:start + 128].reshape(-1)
    return bytes_of(nibbles).view(torch.int8).view(rows, columns // 2)


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    return place(scale, at_scales(*scale.shape), tuple(scale.shape))


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    return pack_scales(vector[None])[0]


def pack_micro(scale: torch.Tensor) -> torch.Tensor:
    """E4M3 [N, K/16] -> [K/16, N]."""
    return place(scale, at_micro(*scale.shape), (scale.shape[1], scale.shape[0]))


def pack_down(down: torch.Tensor) -> torch.Tensor:
    return place(down, at_down(*down.shape), tuple(down.shape))


def pack_up(up: torch.Tensor) -> torch.Tensor:
    return place(up, at_up(*up.shape), tuple(up.shape))


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """0..15 [N, K] -> I32 [N/4, K/2]."""
    rows, columns = codes.shape
    nibbles = place(codes, at_awq(rows, columns), (rows * columns,))
    return bytes_of(nibbles).view(torch.int32).view(rows // 4, columns // 2)


@dataclass
class Layer:
    """A random layer: what it holds in natural order, F32 values of what is stored, and its packed leaves."""

    kind: str
    codes: torch.Tensor  # U8 [N, K], nibbles
    scale: torch.Tensor
    bias: torch.Tensor
    leaves: dict[str, torch.Tensor]
    zeros: torch.Tensor | None = None  # AWQ: W = q * s + z
    tensor_scale: torch.Tensor | None = None
    channel_scale: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    unsigned: bool = False

    @property
    def residual(self) -> torch.Tensor:
        """The quantized weight before smoothing, F32 [N, K]."""
        n, k = self.codes.shape
        if self.kind == "int4":
            codes = self.codes.float() - 16 * (self.codes > 7)
            return (codes.view(n, k // 64, 64) * self.scale.float().t()[..., None]).view(n, k)
        if self.kind == "awq":
            scale, zeros = (t.float().t()[..., None] for t in (self.scale, self.zeros))
            return (self.codes.float().view(n, k // 64, 64) * scale + zeros).view(n, k)
        weight = (E2M1[self.codes.long()].view(n, k // 16, 16) * self.scale.float()[..., None]).view(n, k)
        weight = weight * self.tensor_scale.float()
        return weight if self.channel_scale is None else weight * self.channel_scale.float()[:, None]

    @property
    def weight(self) -> torch.Tensor:
        """The effective weight, F32 [N, K]."""
        if self.kind == "awq":
            return self.residual
        return self.residual / self.smooth.float() + self.up.float() @ self.down.float().t()

    @property
    def plain_bias(self) -> torch.Tensor:
        """The bias that goes with the effective weight (docs/sources/nunchaku.md, "Unsigned activations")."""
        if not self.unsigned:
            return self.bias.float()
        return self.bias.float() + SHIFT * (self.residual / self.smooth.float()).sum(1)

    def forward(self, x: torch.Tensor, rounded: bool = True) -> torch.Tensor:
        """docs/sources/nunchaku.md, "Arithmetic", in F32, activations quantized by `quantized`."""
        x = x.float()
        if self.kind == "awq":
            return x @ self.residual.t() + self.bias.float()
        main = quantized((x + SHIFT if self.unsigned else x) / self.smooth.float(), self.kind, self.unsigned, rounded)
        return main @ self.residual.t() + self.bias.float() + x @ self.down.float() @ self.up.float().t()


def quantized(x: torch.Tensor, kind: str, unsigned: bool = False, rounded: bool = True) -> torch.Tensor:
    """An F32 activation [M, K] through its grid: INT4 as nunchaku; NVFP4 with a tensor scale of 1, codes from the
    rounded scale (the host's rule) or from the unrounded one (nunchaku's;
    docs/sources/nunchaku.md, "Activation rules")."""
    groups = x.view(x.shape[0], -1, 64 if kind == "int4" else 16)
    amax = groups.abs().amax(-1, keepdim=True)
    if kind == "int4":
        low, high = (0, 15) if unsigned else (-7, 7)
        scale = (amax / high).clamp(min=1e-20)
        return ((groups / scale).round().clamp(low, high) * scale).view(x.shape)
    scale = (amax / 6).clamp(max=448)
    stored = scale.to(torch.float8_e4m3fn).float()
    by = stored if rounded else scale
    return (to_e2m1(groups / by.where(by > 0, torch.ones(()))) * stored).view(x.shape)


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest E2M1 value, ties to the even code."""
    grid = E2M1[:8]
    midpoints = (grid[1:] + grid[:-1]) / 2
    low, high = torch.bucketize(x.abs(), midpoints), torch.bucketize(x.abs(), midpoints, right=True)
    return grid[torch.where((low != high) & (low % 2 == 1), high, low)] * x.sign()


def w4a4(rows: int, columns: int, rank: int = 16, kind: str = "int4", unsigned: bool = False, seed: int = 0,
         dtype: torch.dtype = torch.bfloat16, channel_scales: bool = False) -> Layer:
    """A random W4A4 layer of unit gain; unsigned ones have the bias of
    docs/sources/nunchaku.md, "Unsigned activations"."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    if kind == "int4":
        codes[codes == 8] = 7  # the packer does not emit -8
    smooth = (torch.rand(columns, generator=g) + 0.5).to(dtype)
    down = (torch.randn(columns, rank, generator=g) * columns ** -0.5).to(dtype)
    up = (torch.randn(rows, rank, generator=g) * rank ** -0.5).to(dtype)
    bias = torch.randn(rows, generator=g).to(dtype)
    size = columns ** -0.5 * (torch.rand((columns // 64, rows) if kind == "int4" else (rows, columns // 16),
                                         generator=g) + 0.5)
    n, k, r = up_to(rows, 128), up_to(columns, 128), up_to(rank, 16)
    leaves = {"smooth_factor": pack_vector(padded(smooth, k)), "proj_down": pack_down(padded(down, k, r)),
              "proj_up": pack_up(padded(up, n, r)), "qweight": pack_codes(padded(codes, n, k))}
    leaves["smooth_factor_orig"] = torch.full((k,), 9, dtype=dtype)  # never used in arithmetic
    extra = {}
    if kind == "int4":
        scale = (size / 4).to(dtype)
        leaves["wscales"] = pack_scales(padded(scale, k // 64, n))
    else:
        scale = (size * 64).to(torch.float8_e4m3fn)
        leaves["wscales"] = pack_micro(padded(scale.view(torch.uint8), n, k // 16).view(torch.float8_e4m3fn))
        extra["tensor_scale"] = torch.ones(())
        if channel_scales:
            extra["channel_scale"] = ((torch.rand(rows, generator=g) + 0.5) / 128).to(dtype)
            leaves["wcscales"] = pack_vector(padded(extra["channel_scale"], n))
        else:
            extra["tensor_scale"] = torch.tensor(1 / 96).to(dtype).float()
            leaves["wtscale"] = extra["tensor_scale"].to(dtype).reshape(1)
    layer = Layer(kind, codes, scale, bias, leaves, smooth=smooth, down=down, up=up, unsigned=unsigned, **extra)
    if unsigned:
        layer.bias = (bias.float() - SHIFT * (layer.residual / smooth.float()).sum(1)).to(dtype)
    leaves["bias"] = pack_vector(padded(layer.bias, n))
    return layer


def awq(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Layer:
    """A random AWQ layer; zeros are about -7 * scale, as deepcompressor writes them, but not exactly."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    scale = (columns ** -0.5 * (torch.rand(columns // 64, rows, generator=g) + 0.5) / 4).to(dtype)
    zeros = (-7 * scale.float() + torch.randn(scale.shape, generator=g) * 0.001).to(dtype)
    bias = torch.randn(rows, generator=g).to(dtype)
    groups = up_to(columns // 64, 16)
    leaves = {"qweight": pack_awq(codes), "wscales": padded(scale, groups, rows), "wzeros": padded(zeros, groups, rows),
              "bias": bias}
    return Layer("awq", codes, scale, bias, leaves, zeros=zeros)


def interleave(layer: Layer, vectors: int) -> dict[str, torch.Tensor]:
    """The leaves of an AWQ modulation as stored: rows [S, D] -> [D, S], 1 added to the scale biases
    (docs/sources/nunchaku.md, "Modulation")."""
    rows = layer.codes.shape[0]
    order = torch.tensor([s * (rows // vectors) + d for d in range(rows // vectors) for s in range(vectors)])
    bias = layer.bias.float().view(vectors, -1).clone()
    bias[1] += 1
    if vectors == 6:
        bias[4] += 1
    return {"qweight": pack_awq(layer.codes[order]), "wscales": layer.leaves["wscales"][:, order],
            "wzeros": layer.leaves["wzeros"][:, order], "bias": bias.view(-1)[order].to(layer.bias.dtype)}


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())

"""Number formats by formulas written here: codes, scales, and what they mean."""

from __future__ import annotations

import torch

F32, F16, BF16, E4M3, U8, I8 = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int8)

E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])


def fp8(w: torch.Tensor, scale: torch.Tensor | float | None = None, dtype: torch.dtype = E4M3):
    """(codes, scale): one scale, amax / 448, unless given."""
    if scale is None:
        scale = (w.abs().max() / torch.finfo(dtype).max).clamp(min=1e-12)
    if w.stride() == (0, 0):  # a zero weight
        return torch.zeros(w.shape, dtype=dtype), torch.as_tensor(scale)
    return (w / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), torch.as_tensor(scale)


def fp8_rows(w: torch.Tensor, scale_dtype: torch.dtype):
    """(codes, scale [rows, 1])."""
    scale = (w.abs().amax(1, keepdim=True) / 448).clamp(min=1e-5 / 448).to(scale_dtype)
    return (w / scale.float()).clamp(-448, 448).to(E4M3), scale


def fp8_blocks(w: torch.Tensor, rows: int, cols: int, scale_dtype: torch.dtype = F32):
    """(codes, scale [ceil(N/rows), ceil(K/cols)], dequantized)."""
    n, k = w.shape
    pad = torch.nn.functional.pad(w, (0, -k % cols, 0, -n % rows))
    tiles = pad.reshape(pad.shape[0] // rows, rows, pad.shape[1] // cols, cols)
    scale = (tiles.abs().amax((1, 3)) / 448).clamp(min=1e-12).to(scale_dtype)
    whole = scale.float().repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    codes = (w / whole).clamp(-448, 448).to(E4M3)
    return codes, scale, codes.float() * whole


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """4-bit codes of the nearest E2M1 values."""
    code = (x.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (code + 8 * (x < 0)).to(U8)


def nvfp4(w: torch.Tensor, *, high_first: bool, tiles: bool):
    """(packed U8 [N, K/2], block scales E4M3, tensor scale F32 [], dequantized)."""
    n, k = w.shape
    second = w.abs().max() / 2688
    groups = w.reshape(n, k // 16, 16)
    block = (groups.abs().amax(-1) / 6 / second).clamp(2 ** -9, 448).to(E4M3)
    whole = (block.float() * second).unsqueeze(-1)
    codes = e2m1((groups / whole).clamp(-6, 6)).reshape(n, k)
    values = (E2M1[(codes & 7).long()] * torch.where(codes > 7, -1., 1.)).reshape(n, k // 16, 16)
    even, odd = codes[:, 0::2], codes[:, 1::2]
    packed = (even << 4 | odd) if high_first else (odd << 4 | even)
    return packed, swizzle(block) if tiles else block, second, (values * whole).reshape(n, k)


def swizzle(block: torch.Tensor) -> torch.Tensor:
    """Scales [rows, cols] as NVIDIA's 128 x 4 tiles, padded with zeros, as 2-D [ceil128(rows), ceil4(cols)]."""
    rows, cols = block.shape
    padded = torch.nn.functional.pad(block.view(U8), (0, -cols % 4, 0, -rows % 128))
    r, c = padded.shape
    return padded.view(r // 128, 4, 32, c // 4, 4).permute(0, 3, 2, 1, 4).reshape(r, c).contiguous().view(block.dtype)


def mxfp8(w: torch.Tensor):
    """(codes E4M3 [N, K], E8M0 bytes U8 in 128 x 4 tiles, dequantized)."""
    n, k = w.shape
    groups = w.reshape(n, k // 32, 32)
    exponent = torch.ceil(torch.log2((groups.abs().amax(-1) / 448).clamp(min=2.0 ** -126))).clamp(-127, 127)
    whole = torch.exp2(exponent).unsqueeze(-1)
    codes = (groups / whole).clamp(-448, 448).to(E4M3)
    return codes.reshape(n, k), swizzle((exponent + 127).to(U8)), (codes.float() * whole).reshape(n, k)


def hadamard(n: int) -> torch.Tensor:
    """ConvRot's regular Hadamard matrix: Kronecker powers of the 4x4 one with -1 on the anti-diagonal, normalised."""
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    out = torch.ones(1, 1)
    while out.shape[0] < n:
        out = torch.kron(out, base)
    return out / n ** 0.5


def convrot(w: torch.Tensor, group: int):
    """(codes I8, scale F32 [N, 1], effective weight): rows rotated by groups of columns, then one scale a row."""
    h = hadamard(group)
    turned = (w.reshape(w.shape[0], -1, group) @ h).reshape(w.shape)
    scale = (turned.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    codes = (turned / scale).round().clamp(-127, 127).to(I8)
    back = ((codes.float() * scale).reshape(w.shape[0], -1, group) @ h.t()).reshape(w.shape)
    return codes, scale, back

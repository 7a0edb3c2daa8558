"""Microscaling (MX) numbers: codes that share a power of two, E8M0, for every 32 columns.

Vendors choose the shared exponent differently (docs/formats/mxfp8.md). With amax the block's largest magnitude:

    Ascend (npu_dynamic_mx_quant, scale_alg 0; OCP)   floor(log2(amax)) - emax, larger elements saturate     (here)
    msModelSlim's offline weights                     the same, elements rounded half away from zero, not to even
    comfy-kitchen, SGLang on CUDA, cuBLAS             ceil(log2(amax / 448)), nothing saturates

For E4M3 floor and ceil differ exactly where amax has a mantissa above 1.75: 13 % of the blocks of normal data. A loader
never derives scales again; it decodes the stored bytes.
"""

from __future__ import annotations

import torch

from ...host.texts import Text
from .kinds import BLOCK, DUAL_BLOCK

E4M3, E4M3_MAX, E4M3_EMAX = torch.float8_e4m3fn, 448.0, 8
E2M1_MAX, E2M1_EMAX = 6.0, 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of the codes 0..7; bit 3 is the sign
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """U8 E8M0 -> F32: byte b is 2^(b - 127), also for 0 (2^-127); 255 is NaN."""
    byte = scale.view(torch.uint8).to(torch.int32)
    bits = torch.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is a subnormal number
    return torch.where(byte == 255, 0x7FC00000, bits).view(torch.float32)


def shared_exponent(blocks: torch.Tensor, emax: int) -> torch.Tensor:
    """E8M0 bytes U8 [..., blocks] of float blocks [..., blocks, size], by the floor rule.

    amax's exponent field less `emax` (8 for E4M3, 2 for E2M1), at least 0; 255 for a block with infinities or NaN.
    """
    field = (blocks.float().abs().amax(-1).view(torch.int32) >> 23) & 0xFF
    return torch.where(field == 255, field, (field - emax).clamp(min=0)).to(torch.uint8)


def split(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] -> [..., ceil(K / size), size], padded with zeros."""
    missing = -x.shape[-1] % size
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


def scaled(blocks: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """Blocks divided by their shared power of two, F32. Byte 0 gives zeros, as the NPU's reciprocal of it is 0."""
    factor = torch.where(byte == 0, 0.0, 1 / decode_e8m0(byte))
    return blocks.float() * factor[..., None]


def quantize(x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> MXFP8 (codes F8_E4M3 [..., K], U8 E8M0 [..., ceil(K / 32)]), as npu_dynamic_mx_quant does it.

    Floor rule, round half to even, saturation at 448; blocks with byte 0 (amax below 2^-118) become zeros. A `seed`
    other than 0 rounds stochastically, for patched weights.
    """
    blocks = split(x, BLOCK)
    byte = shared_exponent(blocks, E4M3_EMAX)
    values = dither(scaled(blocks, byte), 3, -6, seed).clamp(-E4M3_MAX, E4M3_MAX)
    return values.to(E4M3).flatten(-2)[..., :x.shape[-1]].contiguous(), byte


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize`, for a weight [N, K]. Raises ValueError for infinities and NaN."""
    codes, byte = quantize(weight)
    if bool((byte == 255).any()):
        raise ValueError(Text("the weight has infinities or NaN"))
    return codes, byte


def dequantize(codes: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """MXFP8 -> F32 [..., K]: code x 2^(byte - 127)."""
    columns = codes.shape[-1]
    return (split(codes.float(), BLOCK) * decode_e8m0(byte)[..., None]).flatten(-2)[..., :columns]


def encode_e2m1(values: torch.Tensor, half_away: bool) -> torch.Tensor:
    """Float values -> E2M1 codes U8 0..15, saturating at 6; ties go away from zero, or to the even code."""
    midpoints = torch.tensor(MIDPOINTS, device=values.device)
    magnitude = values.float().abs()
    upper = torch.bucketize(magnitude, midpoints, right=True)
    if not half_away:
        lower = torch.bucketize(magnitude, midpoints)
        upper = torch.where((upper != lower) & (upper % 2 == 1), lower, upper)
    return (upper + 8 * values.signbit()).to(torch.uint8)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Codes U8 0..15 -> F32."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)
    return table[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [..., K] -> U8 [..., K / 2], even columns in the low nibble."""
    pairs = codes.view(torch.uint8).unflatten(-1, (-1, 2))
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """U8 [..., K / 2] -> codes U8 0..15 [..., K]."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def quantize_fp4(x: torch.Tensor, half_away: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> MXFP4 (U8 [..., K / 2], U8 E8M0 [..., K / 32]) with the floor rule, as npu_dynamic_mx_quant does.

    `half_away` is its round_mode "round" (W4A4_MXFP4 activations), else "rint". K must be a multiple of 32.
    """
    blocks = split(x, BLOCK)
    byte = shared_exponent(blocks, E2M1_EMAX)
    return pack(encode_e2m1(dither(scaled(blocks, byte), 1, 0, seed), half_away).flatten(-2)), byte


def dequantize_fp4(packed: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """MXFP4 -> F32 [..., K]: code x 2^(byte - 127)."""
    return (split(decode_e2m1(unpack(packed)), BLOCK) * decode_e8m0(byte)[..., None]).flatten(-2)


def quantize_dual(x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] -> dual-scale MXFP4: (codes, U8 E8M0 [..., K / 32], F32 [..., ceil(K / 512)]).

    As npu_dynamic_dual_level_mx_quant: the F32 scale is amax over 512 columns / 6; x / scale is rounded to x's dtype
    and quantized as MXFP4, ties to even.
    """
    blocks = split(x, DUAL_BLOCK)
    amax = blocks.float().abs().amax(-1)
    dual = amax / torch.full_like(amax, E2M1_MAX)  # on a GPU, tensor / scalar would multiply by a reciprocal
    level = torch.where(dual[..., None] == 0, 0.0, blocks.float() / dual[..., None]).to(x.dtype)
    codes, byte = quantize_fp4(level.flatten(-2)[..., :x.shape[-1]], seed=seed)
    return codes, byte, dual


def dequantize_dual(packed: torch.Tensor, byte: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Dual-scale MXFP4 -> F32 [..., K]: code x 2^(byte - 127) x dual."""
    values = dequantize_fp4(packed, byte)
    return (split(values, DUAL_BLOCK) * dual[..., None]).flatten(-2)[..., :values.shape[-1]]


def dither(values: torch.Tensor, mantissa: int, lowest: int, seed: int) -> torch.Tensor:
    """Add up to half a step of a float format (mantissa bits, exponent of its smallest normal number) at random.

    Rounding to nearest afterwards is stochastic rounding. Seed 0 leaves the values alone.
    """
    if not seed:
        return values
    exponent = torch.frexp(values).exponent.sub(1).clamp(min=lowest)
    return values + torch.ldexp(noise(values, seed) - 0.5, exponent - mantissa)


def noise(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform F32 numbers in [0, 1) of the shape of `values`, from a seed."""
    generator = torch.Generator(device=values.device).manual_seed(seed)
    return torch.rand(values.shape, generator=generator, device=values.device)

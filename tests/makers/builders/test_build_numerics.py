"""The arithmetic of the builders: FP8 against its formula, NVFP4 against nvidia-modelopt's own NVFP4QTensor."""

from __future__ import annotations

import pytest
import torch

from support.pack import start_comfy

start_comfy()

from quantized_transformers.quant.convert import fp8, nvfp4
from quantized_transformers.quant.convert.blocks import BLOCK, largest

pytestmark = pytest.mark.unit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((64, 64), (7, 48), (3, 16), (1, 32), (65, 1040), (5, 40), (130, 258))  # the last two are padded to groups


def weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random, with a block of zeros, of negative zeros, of tiny values, and every midpoint between E2M1 numbers."""
    torch.manual_seed(sum(shape))
    w = torch.randn(shape)
    w[0, :16] = 0
    w[-1, -16:] = -0.0 if shape[0] > 1 else 0.5
    w[shape[0] // 2] *= 1e-5
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    if shape[1] >= 48:
        w[1, 16:32] = torch.cat([midpoints, -midpoints])
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_is_modelopts(shape, dtype):
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    w = weight(shape, dtype)
    if shape[1] >= 48:
        w[0, -1] = 6.0 * 448  # scale_2 = 1 and a block scale of 1, so that quotients lie exactly on the midpoints
    theirs, block, scale_2 = NVFP4QTensor.quantize(w.clone(), 16)
    ours = nvfp4.scale_of(largest(w))
    assert torch.equal(ours, scale_2.reshape(())) and ours.dtype == torch.float32
    codes, blocks = nvfp4.quantize(w, ours)
    assert torch.equal(blocks.view(torch.uint8), block.view(torch.uint8))
    assert torch.equal(codes, theirs._quantized_data)


def test_nvfp4_across_blocks_of_work():
    """More than one block of work, with an end that is none: as in one piece by ModelOpt."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    w = torch.randn(261, 2048).bfloat16()
    assert w.numel() % BLOCK and w.numel() > 2 * BLOCK
    theirs, block, scale_2 = NVFP4QTensor.quantize(w.clone(), 16)
    codes, blocks = nvfp4.quantize(w, scale_2.reshape(()))
    assert torch.equal(codes, theirs._quantized_data) and torch.equal(blocks.view(torch.uint8), block.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e-38), (torch.bfloat16, 2e37), (torch.float16, 1e-5),
                                               (torch.float32, 1e-42), (torch.float32, 1.0)])
def test_nvfp4_at_the_ends_of_a_dtype(dtype, factor):
    """Codes are looked up by the bits of a weight; here by the division that defines them, subnormal numbers among them."""
    torch.manual_seed(1)
    w = (torch.randn(96, 128) * factor).to(dtype)
    scale_2 = nvfp4.scale_of(largest(w))
    codes, blocks = nvfp4.quantize(w.clone(), scale_2)
    values = w.float().view(-1, 16)
    block = values.abs().amax(1) / (6 * scale_2)
    block[block == 0] = 1.0
    block = block.clamp(2.0 ** -9, 448).to(torch.float8_e4m3fn)
    quotients = values / (block.float() * scale_2)[:, None]
    sizes = quotients.abs()
    wanted = sum((sizes > bound).int() for bound in (0.25, 1.25, 2.5, 5.0)) \
        + sum((sizes >= bound).int() for bound in (0.75, 1.75, 3.5)) + 8 * (quotients < 0)
    assert torch.equal(blocks.view(-1).view(torch.uint8), block.view(torch.uint8))
    assert torch.equal(codes.view(-1, 8), (wanted[:, ::2] | wanted[:, 1::2] << 4).to(torch.uint8))


@pytest.mark.parametrize("scale_2", [2.0 ** -12, 0.00123, 0.0009765, 1e-36, 3e33])
def test_every_bf16_number_under_many_block_scales(scale_2):
    """All finite BF16 numbers (-0, subnormal ones and ties among them) that a group's largest one allows, for all eight
    mantissas of E4M3 and both of its ends; by ModelOpt under the same tensor scale. One group's largest number a call:
    block scales are looked up by it, and decide how codes are told."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    scale = torch.tensor(scale_2, dtype=torch.float32)
    wide = torch.tensor([448, *(2 ** e * (1 + m / 8) for e in (-6, -2, 1, 7) for m in range(8)), 2 ** -7, 1.45 * 2 ** -9, 2 ** -9, 1e-4])
    seen = set()
    for share in (1.0, 1.06, 0.95, 2.0):  # the number of a scale, of those that are rounded to it, and beyond the greatest
        for top in (wide * 6 * scale * share).to(torch.bfloat16).unique():
            if not top.isfinite():
                continue
            values = every[every.abs() <= top]
            values = torch.cat([values, values.new_zeros(-len(values) % 15)]).view(-1, 15)
            w = torch.cat([values[:, :7], top.expand(len(values), 1), values[:, 7:]], 1)
            w = torch.cat([w, torch.zeros_like(w[:1]), -torch.zeros_like(w[:1])])
            theirs, block, _ = NVFP4QTensor.quantize(w.clone(), 16, weights_scaling_factor_2=scale)
            codes, blocks = nvfp4.quantize(w, scale)
            assert torch.equal(blocks.view(torch.uint8), block.view(torch.uint8))
            assert torch.equal(codes, theirs._quantized_data), float(top)
            seen.add(int(block.view(torch.uint8)[0, 0]))
    assert len(seen) > 30 and {1, 126} <= seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_work_with_and_without_far_block_scales(dtype):
    """Groups so small that their scale is E4M3's least, subnormal or clamped, beside others: they are told another way."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    torch.manual_seed(2)
    w = torch.randn(300, 2048)
    w[100:200] *= (2.0 ** -torch.randint(0, 30, (100, 128, 1)).float()).expand(100, 128, 16).reshape(100, 2048)
    w = w.to(dtype)
    scale_2 = nvfp4.scale_of(largest(w))
    theirs, block, _ = NVFP4QTensor.quantize(w.clone(), 16, weights_scaling_factor_2=scale_2)
    codes, blocks = nvfp4.quantize(w, scale_2)
    assert torch.equal(blocks.view(torch.uint8), block.view(torch.uint8)) and int(block.view(torch.uint8).min()) == 1
    assert torch.equal(codes, theirs._quantized_data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_its_formula(dtype):
    """amax / 448 and F32 division, clamped; also where a scale is smaller than the weight needs."""
    w = weight((261, 2048), dtype)
    for scale in (fp8.scale_of(largest(w)), fp8.scale_of(largest(w) / 2), fp8.scale_of(largest(w), 240.0)):
        codes = fp8.quantize(w, scale)
        wanted = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8)) and codes.shape == w.shape
        assert not codes.float().isnan().any()
    assert float(fp8.scale_of(448.0)) == 1.0 and fp8.scale_of(1.0).shape == (1,)


def test_zeros_have_a_usable_scale():
    """A tensor of zeros: scale 1 (as ModelOpt's export_amax gives), never 0 or NaN."""
    w = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert largest(w) == 0 and float(fp8.scale_of(0.0)) == 1.0 and float(nvfp4.scale_of(0.0)) == 1.0
    assert not fp8.quantize(w, fp8.scale_of(0.0)).float().any()
    codes, blocks = nvfp4.quantize(w, nvfp4.scale_of(0.0))
    assert not codes.any() and bool((blocks.float() == 1).all())


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float8_e4m3fn))
def test_largest_magnitude(dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        w = torch.randn(1000).to(dtype)
        for values in (w, w.float().abs().to(dtype), (-w.float().abs()).to(dtype), w[:0]):
            assert largest(values) == (float(values.float().abs().max()) if len(values) else 0)
    bad = (float("nan"), -float("nan")) + (() if dtype.itemsize == 1 else (float("inf"), -float("inf")))
    for value in bad:
        w[500] = torch.tensor(value).to(dtype)
        with pytest.raises(ValueError, match="NaN" if value != value else "infinite"):
            largest(w)

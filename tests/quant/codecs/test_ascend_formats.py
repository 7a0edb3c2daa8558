"""Ascend's formats against a second implementation (support/ascend.py): what tensors mean, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantized_transformers.quant.ascend import integers, mx
from quantized_transformers.quant.ascend.mx import quantize_weight as mxfp8_quantize
from quantized_transformers.quant.ascend.schemes import REFUSED, SCHEMES
from quantized_transformers.quant.layouts.stored import FORMAT as TILES
from support import ascend
from support.ascend_net import dequantized, native

pytestmark = pytest.mark.unit

KINDS = sorted(set(SCHEMES) - {"MXFP4"})
DTYPES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.float32: "F32",
          torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


class Leaf:
    """A header's entry of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape = DTYPES[tensor.dtype], tuple(tensor.shape)


def leaves(part):
    return {leaf: Leaf(tensor) for leaf, tensor in part.items()}


def columns_of(kind: str) -> int:
    return 1024 if "DUAL" in kind else 128


# amax -> bytes, docs/sources/ascend.md, "Shared exponents"
VECTORS = [(0, 0, 0), (2.0 ** -119, 0, 6), (1, 119, 125), (1.75, 119, 125), (1.7500001, 119, 125), (2, 120, 126),
           (447, 127, 133), (448, 127, 133), (449, 127, 133), (512, 128, 134), (float("inf"), 255, 255),
           (float("nan"), 255, 255)]


@pytest.mark.parametrize(("amax", "e4m3", "e2m1"), VECTORS)
@pytest.mark.parametrize("sign", [1, -1])
def test_shared_exponent_vectors(amax, e4m3, e2m1, sign):
    block = torch.zeros(1, 1, 32)
    block[0, 0, 5] = sign * amax
    assert int(mx.shared_exponent(block, 8)) == e4m3 and int(mx.shared_exponent(block, 2)) == e2m1


def test_floor_saturates_where_ceil_would_not():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([449.0, 511, 448, -500])
    codes, byte = mx.quantize(x)
    assert int(byte) == 127 and codes.float()[0, :4].tolist() == [448, 448, 448, -448]


def test_e2m1_rounding():
    values = torch.tensor([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, 7, -.25, -5, 0.26, 4.99])
    even = [0, 1, 1, 2, 2, 4, 4, 6, 0, -4, .5, 4]
    away = [.5, 1, 1.5, 2, 3, 4, 6, 6, -.5, -6, .5, 4]
    assert mx.decode_e2m1(mx.encode_e2m1(values, False)).tolist() == even
    assert mx.decode_e2m1(mx.encode_e2m1(values, True)).tolist() == away


def random_blocks(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of every magnitude down to subnormal numbers, with zeros, ties and whole blocks of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 96, generator=g) * torch.exp2(torch.randint(-140, 100, (64, 1), generator=g).float())
    x[torch.rand(x.shape, generator=g) < 0.1] = 0
    x[::7, 32:64] = 0
    x[1::5] = torch.exp2(torch.randint(-30, 30, (13, 96), generator=g).float()) * 1.0625
    return x.to(dtype)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mx_quantization_equals_the_second_implementation(seed, dtype):
    x = random_blocks(seed, dtype)
    if dtype == torch.float16:
        x = x.nan_to_num(0, 0, 0)
    codes, byte = mx.quantize(x)
    theirs, their_byte = ascend.mx(ascend.numpy(x), "e4m3")
    assert np.array_equal(byte.numpy(), their_byte)
    assert np.array_equal(ascend.numpy(codes), ascend.numpy(torch.from_numpy(theirs).view(mx.E4M3)))
    assert np.array_equal(mx.dequantize(codes, byte).numpy(), ascend.from_mx(theirs, their_byte, "e4m3"))
    for away in (False, True):
        packed, byte = mx.quantize_fp4(x, away)
        theirs, their_byte = ascend.mx(ascend.numpy(x), "e2m1", away)
        assert np.array_equal(byte.numpy(), their_byte)
        assert np.array_equal(mx.dequantize_fp4(packed, byte).numpy(), ascend.from_mx(theirs, their_byte, "e2m1"))


@pytest.mark.parametrize("seed", range(3))
def test_mx_error_is_below_half_a_step(seed):
    """Arithmetic: unsaturated elements move by half of 2^-3 of themselves at most, or half the smallest step."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    codes, byte = mxfp8_quantize(x)
    scale = mx.decode_e8m0(byte).repeat_interleave(32, 1)
    kept = x.abs() <= 448 * scale
    error = (mx.dequantize(codes, byte) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2 ** -10))[kept].all()
    assert (error <= 64 * scale)[~kept].all() and 0 < int((~kept).sum()) < kept.numel() // 50


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.randn(4, 64)
    weight[2, 40] = bad
    with pytest.raises(ValueError, match="infinities or NaN"):
        mxfp8_quantize(weight)


def test_e8m0_is_the_power_of_two_for_every_byte():
    values = mx.decode_e8m0(torch.arange(256, dtype=torch.uint8))
    assert values[:255].double().log2().tolist() == [float(b - 127) for b in range(255)] and values[255].isnan()


def test_columns_that_are_no_multiple_of_32():
    weight = torch.randn(5, 70)
    codes, byte = mxfp8_quantize(weight)
    assert codes.shape == (5, 70) and byte.shape == (5, 3)
    theirs = ascend.from_mx(*ascend.mx(weight.numpy(), "e4m3"), "e4m3")
    layer = native("W8A8_MXFP8", {"weight": codes, "weight_scale": byte})
    assert np.array_equal(dequantized(layer).numpy(), theirs) and layer.layout == "mxfp8"


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_equals_the_independent_decoding(kind, smoothed):
    part = ascend.make(kind, 48, columns_of(kind))
    scheme = SCHEMES[kind]
    if smoothed:
        part["mul_scale"] = torch.rand(columns_of(kind)) + 0.5
    shape = scheme.shape(leaves(part))
    assert shape == (48, columns_of(kind)) and scheme.problem(leaves(part), *shape) == ""
    layer = native(kind, part, True)
    expected = part["weight"].float() if kind == "FLOAT" else torch.from_numpy(ascend.decode(kind, part))
    if kind == "FLOAT" and smoothed:
        expected = (expected * part["mul_scale"]).bfloat16().float()
    assert torch.equal(dequantized(layer), expected)
    assert (layer.rows, layer.columns) == shape and torch.equal(layer.tensors["bias"], part["bias"])
    host = {"W8A8_DYNAMIC": "int8_tensorwise", "W8A8_MXFP8": "mxfp8", "FLOAT": ""}
    own = kind not in host or (smoothed and kind != "FLOAT")
    assert layer.layout == (TILES if own else host[kind])


def test_a_smoothing_vector_of_ones_is_skipped():
    layer = native("W8A8_MXFP8", ascend.make("W8A8_MXFP8") | {"mul_scale": torch.ones(128)})
    assert layer.layout == "mxfp8"


def test_int4_stored_one_a_byte_or_packed_along_rows():
    part = ascend.make("W4A4_DYNAMIC")
    packed = part | {"weight": torch.from_numpy(ascend.row_pairs(part["weight"].numpy()))}
    assert packed["weight"].shape == (24, 128)
    one, two = (native("W4A4_DYNAMIC", dict(p)) for p in (part, packed))
    assert torch.equal(one.tile["codes"], two.tile["codes"]) and one.tile["codes"].shape == (48, 64)
    assert torch.equal(dequantized(two), torch.from_numpy(ascend.decode("W4A4_DYNAMIC", part)))


def test_group_scales_and_offsets_of_weight_only_int8():
    part = ascend.make("W8A16")
    g = torch.Generator().manual_seed(1)
    part |= {"weight_scale": torch.rand(48, 4, generator=g) + 0.1,
             "weight_offset": torch.randint(-9, 9, (48, 4), generator=g).float()}
    assert SCHEMES["W8A16"].problem(leaves(part), 48, 128) == ""
    assert torch.equal(dequantized(native("W8A16", dict(part))),
                       torch.from_numpy(ascend.decode("W8A16", part)))


def test_mxfp4_numbers_in_e4m3_as_old_writers_kept_them():
    part = ascend.make("W4A4_MXFP4")
    numbers = mx.decode_e2m1(mx.unpack(part["weight"])).to(mx.E4M3)
    old = part | {"weight": numbers}
    assert SCHEMES["MXFP4"].problem(leaves(old), 48, 128) == "" and SCHEMES["MXFP4"].shape(leaves(old)) == (48, 128)
    assert torch.equal(dequantized(native("MXFP4", old)),
                       torch.from_numpy(ascend.decode("W4A4_MXFP4", part)))
    with pytest.raises(ValueError, match="not E2M1"):
        native("MXFP4", part | {"weight": (numbers.float() * 0.7).to(mx.E4M3)})


def test_deq_scale_in_int64_is_bits_and_not_a_number():
    part = ascend.make("W8A8")
    bits = part["deq_scale"].view(torch.int32).to(torch.int64)
    stored = part | {"deq_scale": bits}
    assert SCHEMES["W8A8"].problem(leaves(stored), 48, 128) == ""
    one, two = (native("W8A8", dict(p)) for p in (part, stored))
    assert torch.equal(one.tile["scale"], two.tile["scale"])
    assert torch.equal(dequantized(two), torch.from_numpy(ascend.decode("W8A8", stored)))


def test_quant_bias_and_bias_are_made_from_each_other():
    part = ascend.make("W8A8")
    with_float = native("W8A8", {k: v for k, v in part.items() if k != "quant_bias"})
    assert torch.equal(with_float.tile["quant_bias"], part["quant_bias"])
    with_int = native("W8A8", {k: v for k, v in part.items() if k != "bias"}, True)
    error = (with_int.tensors["bias"] - part["bias"]).abs()
    assert (error <= part["deq_scale"] * 0.51).all()  # half an integer step, and F32 rounding
    both = native("W8A8", dict(part))
    assert torch.equal(both.tensors["bias"], part["bias"])
    assert torch.equal(both.tile["quant_bias"], part["quant_bias"])
    none = native("W8A8", ascend.make("W8A8", bias=False), False)
    assert "bias" not in none.tensors


def test_tiny_mxfp8_blocks_stay_out_of_the_hosts_layout():
    """Byte 0 is 2^-127; the host decodes it as zero."""
    part = ascend.make("W8A8_MXFP8")
    part["weight_scale"][3, 1] = 0
    layer = native("W8A8_MXFP8", dict(part))
    assert layer.layout == TILES and torch.equal(dequantized(layer), torch.from_numpy(ascend.decode("W8A8_MXFP8", part)))
    part["weight"].view(torch.uint8)[3, 32:64] = 0
    assert native("W8A8_MXFP8", dict(part)).layout == "mxfp8"


BROKEN = [
    ("W8A8_DYNAMIC", {"weight_scale": torch.full((48, 1), float("nan"))}, "weight_scale"),
    ("W8A8_DYNAMIC", {"weight_scale": torch.zeros(48, 1)}, "weight_scale holds zeros"),
    ("W8A8_DYNAMIC", {"weight_offset": torch.ones(48, 1)}, "weight_offset is not zero"),
    ("W8A8", {"deq_scale": torch.full((48,), -1.0)}, "deq_scale"),
    ("W8A8", {"input_scale": torch.tensor([0.0])}, "input_scale"),
    ("W8A8", {"input_offset": torch.tensor([0.5])}, "input_offset"),
    ("W4A4_DYNAMIC", {"weight": torch.full((48, 128), 8, dtype=torch.int8)}, "outside -8..7"),
    ("W4A4_DYNAMIC", {"weight": torch.full((48, 128), -128, dtype=torch.int8)}, "outside -8..7"),
    ("W8A8_MXFP8", {"mul_scale": torch.zeros(128)}, "mul_scale"),
]


@pytest.mark.parametrize(("kind", "change", "says"), BROKEN)
def test_values_that_mean_nothing_are_refused(kind, change, says):
    with pytest.raises(ValueError, match=says):
        native(kind, ascend.make(kind) | change)


WRONG = [
    ("W8A8_DYNAMIC", "weight", torch.zeros(48, 128), "weight is F32, expected I8"),
    ("W8A8_DYNAMIC", "weight", torch.zeros(48, 64, dtype=torch.int8), r"weight is \[48, 64\]"),
    ("W8A8_DYNAMIC", "weight_scale", None, "no weight_scale"),
    ("W8A8", "deq_scale", torch.zeros(48, dtype=torch.int32), "deq_scale is I32, expected F32 or I64"),
    ("W8A8", "input_scale", None, "no input_scale"),
    ("W8A8", "input_scale", torch.zeros(48), r"input_scale is \[48\]"),
    ("W8A8_MXFP8", "weight_scale", torch.zeros(128, 4, dtype=torch.uint8), r"weight_scale is \[128, 4\]"),
    ("W8A8_MXFP8", "weight_scale", torch.zeros(48, 4), "weight_scale is F32"),
    ("W4A4_MXFP4", "weight_dual_scale", torch.zeros(48, 1, 1), "does not have: weight_dual_scale"),
    ("W4A4_MXFP4_DUALSCALE", "weight_dual_scale", None, "no weight_dual_scale"),
    ("W8A8_DYNAMIC", "bias", torch.zeros(47), r"bias is \[47\]"),
    ("W8A8_DYNAMIC", "mul_scale", torch.zeros(48), r"mul_scale is \[48\]"),
]


@pytest.mark.parametrize(("kind", "leaf", "tensor", "says"), WRONG)
def test_dtypes_and_shapes_are_checked(kind, leaf, tensor, says):
    part = ascend.make(kind, 48, columns_of(kind)) | {leaf: tensor}
    present = {name: value for name, value in part.items() if value is not None}
    import re

    assert re.search(says, SCHEMES[kind].problem(leaves(present), 48, columns_of(kind)))


def test_no_type_is_both_loaded_and_refused():
    assert not set(SCHEMES) & set(REFUSED)


def test_integer_matmul_is_exact_for_the_largest_codes():
    a, b = torch.full((3, 5000), -128, dtype=torch.int8), torch.full((5000, 2), -128, dtype=torch.int8)
    b[0] = 127
    assert integers.matmul(a, b)[0, 0].item() == 4999 * 128 * 128 - 128 * 127

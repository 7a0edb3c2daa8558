"""Ascend layers in a Linear of the host: the output against explicit formulas (support/ascend.py), and all that the
host does to a weight (LoRA, copies, streaming, saving)."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from quantized_transformers.quant.ascend import mx
from quantized_transformers.quant.ascend.schemes import SCHEMES
from quantized_transformers.quant.kernels.comfy_kitchen import RULES as KITCHEN_RULES
from quantized_transformers.quant.layouts.tiled import TilesLayout, is_tiled
from support import ascend
from support.ascend_net import dequantized, native, operations

pytestmark = pytest.mark.unit

KINDS = sorted(set(SCHEMES) - {"MXFP4", "FLOAT"})
OWN = [kind for kind in KINDS if kind not in ("W8A8_DYNAMIC", "W8A8_MXFP8")]
F32, BF16 = torch.float32, torch.bfloat16


def columns_of(kind: str) -> int:
    return 1024 if "DUAL" in kind else 128


def make(kind: str, smoothed: bool = False, **options) -> dict[str, torch.Tensor]:
    part = ascend.make(kind, 48, columns_of(kind), **options)
    if smoothed:
        part["mul_scale"] = torch.rand(columns_of(kind), generator=torch.Generator().manual_seed(3)) + 0.5
    return part


def linear(kind, part, backend="reference", dtype=F32, disabled=("mxfp8",)):
    """A Linear of the host's mixed-precision operations with the layer loaded, as a checkpoint load does it."""
    layer = native(kind, part)
    module = operations(backend, dtype, disabled=set(disabled)).Linear(layer.columns, layer.rows, bias="bias" in part, device="cpu", dtype=dtype)
    missing, unexpected = module.load_state_dict(dict(layer.tensors), strict=False)
    assert not missing and not unexpected
    return module, layer


def activations(columns: int, dtype=F32, rows: int = 16) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(9))
    x[2] = 0  # a token of zeros
    x[3, :64] *= 50
    return x.to(dtype)


def run(module, x):
    with torch.inference_mode():
        return module(x)


def rel(a, b) -> float:
    a, b = (torch.as_tensor(np.asarray(t.float() if isinstance(t, torch.Tensor) else t)).double() for t in (a, b))
    return float((a - b).norm() / b.norm())


INTEGER = ("W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "W4A8_DYNAMIC")


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_formula(kind, dtype, smoothed):
    part = make(kind, smoothed)
    part["bias"] = part["bias"].to(dtype).float()  # as the host keeps it
    module, _ = linear(kind, part, dtype=dtype)
    x = activations(columns_of(kind), dtype)
    if kind == "W8A16":  # no rule for activations: in the dtype, where the processor has units for it, or in F32
        weight = torch.from_numpy(ascend.decode(kind, part)).double()
        exact = x.double() @ weight.t() + part["bias"].double()
        bound = (x.double().abs() @ weight.abs().t() + part["bias"].abs()) * (
            2.0 ** -24 * 16 + (2 * torch.finfo(dtype).eps if dtype != F32 else 0))
        assert ((run(module, x).double() - exact).abs() <= bound).all()
        return
    exact = torch.from_numpy(ascend.forward(kind, part, x))
    out = run(module, x)
    if kind in INTEGER:  # integer sums and a known order of scales: the same bits
        assert torch.equal(out, exact.to(dtype))
    else:  # F32 sums in another order: 2^-24 a product, of |x| |w|; then one rounding
        step = 2.0 ** -24 * 16 + (torch.finfo(dtype).eps if dtype != F32 else 0)
        weight = torch.from_numpy(ascend.decode(kind, part)).abs()
        bound = (x.float().abs() * 1.3 @ weight.t() + part["bias"].abs()) * step
        assert ((out.float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", OWN)
def test_reference_against_comfy_kitchen(kind):
    """Within 1e-3 of each other, or the report says which rule differs."""
    part = make(kind)
    x = activations(columns_of(kind))
    out = [run(linear(kind, part, backend)[0], x) for backend in ("reference", "comfy_kitchen")]
    difference = rel(out[0], out[1])
    lowered = kind.lower()
    assert (difference < 1e-6) == (lowered not in KITCHEN_RULES), difference


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8_MXFP8"])
def test_host_layouts_run_by_the_host_or_by_the_reference(kind, dtype):
    """INT8: division against a reciprocal, within 1e-3 in F32; in BF16 the host divides in BF16, 8 bits of a quotient
    of up to 127. MXFP8 on this CPU: activations stay unquantized."""
    part = make(kind)
    x = activations(128, dtype)
    mine, theirs = (run(linear(kind, part, backend, dtype)[0], x) for backend in ("reference", "comfy_kitchen"))
    if kind == "W8A8_DYNAMIC":
        assert rel(mine, theirs) < (1e-3 if dtype == F32 else 1e-2)
    else:
        weight = torch.from_numpy(ascend.decode(kind, part)).to(dtype)
        assert rel(theirs, torch.nn.functional.linear(x, weight, part["bias"].to(dtype))) < 1e-6
        assert 0.005 < rel(mine, theirs) < 0.05


def test_mxfp8_on_the_hosts_rule_differs_by_the_ceiling():
    """With the host's matmul on, it quantizes activations too: only the shared exponent's rule differs."""
    from comfy_kitchen.tensor import QuantizedTensor

    x = activations(128)
    theirs = QuantizedTensor.from_float(x, "TensorCoreMXFP8Layout")
    mine = mx.dequantize(*mx.quantize(x))
    other = (theirs.dequantize() != mine).unflatten(1, (-1, 32)).any(-1)
    mantissa = torch.frexp(x.unflatten(1, (-1, 32)).abs().amax(-1)).mantissa * 2
    assert torch.equal(other, other & (mantissa > 1.75)) and other.any()
    out = run(linear("W8A8_MXFP8", make("W8A8_MXFP8"), "comfy_kitchen", disabled=())[0], x)
    weight = torch.from_numpy(ascend.decode("W8A8_MXFP8", make("W8A8_MXFP8")))
    assert rel(out, theirs.dequantize() @ weight.t() + make("W8A8_MXFP8")["bias"]) < 1e-6


def test_int4_with_a_scale_for_each_group_of_columns():
    part = make("W4A8_DYNAMIC")
    part["weight_scale"] = torch.rand(48, 4, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.01
    part["weight_offset"] = torch.zeros(48, 4)
    module, _ = linear("W4A8_DYNAMIC", part)
    x = activations(128)
    codes, scale = ascend.tokens(x.numpy(), 127)
    weight = ascend.decode("W4A8_DYNAMIC", part)
    expected = (codes.astype(np.float64) @ weight.T.astype(np.float64)) * scale[:, None] + part["bias"].numpy()
    assert rel(run(module, x), expected) < 1e-6


def test_quant_bias_or_bias_but_never_both():
    part = make("W8A8")
    x = activations(128)
    once = rel(run(linear("W8A8", part)[0], x), torch.nn.functional.linear(x.clamp(-3.7, 4.1), torch.from_numpy(
        ascend.decode("W8A8", part)), part["bias"]))
    assert once < 0.02  # static INT8 of activations inside the calibrated range
    only = {leaf: tensor for leaf, tensor in part.items() if leaf != "bias"}
    layer = native("W8A8", only, bias=True)
    module, _ = linear("W8A8", part | {"bias": layer.tensors["bias"]})
    assert torch.equal(run(module, x), run(linear("W8A8", part)[0], x))


def test_quant_bias_is_exact_where_the_host_rounds_the_float_bias():
    """A model in BF16 keeps the float bias in BF16; F32 activations still get quant_bias and nothing else."""
    part = make("W8A8")
    assert not torch.equal(part["bias"], part["bias"].to(BF16).float())
    x = activations(128)
    assert torch.equal(run(linear("W8A8", part, dtype=BF16)[0], x), torch.from_numpy(ascend.forward("W8A8", part, x)))


def test_a_static_layer_without_a_bias():
    part = make("W8A8", bias=False)
    x = activations(128, BF16)
    assert torch.equal(run(linear("W8A8", part, dtype=BF16)[0], x),
                       torch.from_numpy(ascend.forward("W8A8", part, x)).to(BF16))


@pytest.mark.parametrize("kind", OWN)
def test_three_dimensions_and_outside_inference_mode(kind):
    module, _ = linear(kind, make(kind))
    x = activations(columns_of(kind))
    with torch.no_grad():
        out = module(x.reshape(2, 8, -1))
    assert out.shape == (2, 8, 48) and torch.equal(out.reshape(16, 48), run(module, x))


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision_asked_for_leaves_activations_alone(kind):
    from quantized_transformers.quant.marker import marker

    part = make(kind)
    module, layer = linear(kind, part)
    conf = json.loads(bytes(layer.tensors["comfy_quant"].tolist()))
    again = dict(layer.tensors) | {"comfy_quant": marker(conf | {"full_precision_matrix_mult": True})}
    module.load_state_dict(again)
    x = activations(columns_of(kind))
    weight = torch.from_numpy(ascend.decode(kind, part))
    assert rel(run(module, x), torch.nn.functional.linear(x, weight, part["bias"])) < 1e-6
    assert module.state_dict()["comfy_quant"].tolist() == again["comfy_quant"].tolist()


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(kind, smoothed):
    module, layer = linear(kind, make(kind, smoothed), dtype=BF16)
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    again, _ = linear(kind, make(kind, smoothed, seed=5), dtype=BF16)
    again.load_state_dict(saved)
    x = activations(columns_of(kind), BF16)
    assert torch.equal(run(again, x), run(module, x))
    assert torch.equal(again.weight.dequantize(), dequantized(layer).to(BF16))


@pytest.mark.parametrize("kind", OWN)
def test_copies_share_nothing_and_moves_keep_everything(kind):
    module, layer = linear(kind, make(kind, True))
    x = activations(columns_of(kind))
    before, weight = run(module, x), module.weight
    for other in (weight.clone(), weight.to(torch.device("cpu"), copy=True), copy.deepcopy(module).weight):
        for mine, theirs in zip(TilesLayout.get_plain_tensors(weight),
                                TilesLayout.get_plain_tensors(other), strict=True):
            assert mine.data_ptr() != theirs.data_ptr() and torch.equal(mine.float(), theirs.float())
    target = torch.empty_like(weight)
    target.copy_(weight)
    assert torch.equal(target.dequantize(), dequantized(layer))
    assert torch.equal(run(copy.deepcopy(module).to(torch.device("cpu")), x), before)
    assert torch.equal(weight.to(BF16).dequantize(), dequantized(layer).to(BF16))


@pytest.mark.parametrize("kind", OWN)
def test_the_hosts_streaming_buffer_round_trip(kind):
    """What dynamic VRAM does: all inner tensors gathered in one byte buffer and read back as a weight."""
    import comfy.memory_management as memory

    module, layer = linear(kind, make(kind, True))
    buffer = torch.zeros(memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8)
    weight, bias = memory.interpret_gathered_like([module.weight, module.bias], buffer)
    weight.copy_(module.weight)
    bias.copy_(module.bias)
    assert torch.equal(weight.dequantize(), dequantized(layer)) and torch.equal(bias, module.bias)


def test_stored_bytes_stay_the_views_they_came_as():
    for kind in ("W8A8", "W4A4_MXFP4", "W4A8_MXFP", "WFP8AFP8_DYNAMIC", "W8A16"):
        part = make(kind)
        module, _ = linear(kind, part)
        assert module.weight.data_ptr() == part["weight"].data_ptr()


class Patched(torch.nn.Module):
    """What the host patches: a model with one Linear."""

    def __init__(self, module) -> None:
        super().__init__()
        self.layer = module


def patch(module, size: float):
    """The Linear under the host's ModelPatcher with a LoRA-like difference of `size`, and that difference."""
    import comfy.model_patcher

    g = torch.Generator().manual_seed(4)
    rows, columns = module.weight.shape
    difference = torch.randn(rows, 4, generator=g) @ torch.randn(4, columns, generator=g) * size
    model = Patched(module)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.add_patches({"layer.weight": ("diff", (difference,))})
    return patcher, difference


# Requantizing adds to the patched weight: half a step RNE, a whole one with the host's stochastic rounding.
REQUANTIZED = {"W8A8": 0.012, "W8A16": 0.012, "W8A8_DYNAMIC": 0.012, "WFP8AFP8_DYNAMIC": 0.045, "W8A8_MXFP8": 0.045}


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_through_the_hosts_ordinary_path(kind, smoothed):
    part = make(kind, smoothed)
    module, layer = linear(kind, part)
    x = activations(columns_of(kind))
    before = run(module, x)
    patcher, difference = patch(module, 0.02)
    patcher.patch_weight_to_device("layer.weight")
    wanted = dequantized(layer) + difference
    now = module.weight.dequantize() if hasattr(module.weight, "_qdata") else module.weight
    limit = REQUANTIZED.get(kind, 1e-7)  # 4-bit weights are patched in the compute dtype
    assert rel(now, wanted) < limit
    out = run(module, x)
    seen = torch.nn.functional.linear(x, wanted, part["bias"])
    assert rel(out[3:] if kind != "W8A8" else out[4:], seen[3:] if kind != "W8A8" else seen[4:]) < 0.08
    assert rel(before, seen) > 0.15  # the patch is an effect, not noise
    patcher.unpatch_model(torch.device("cpu"))
    assert torch.equal(run(module, x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_at_run_time_multiplies_dequantized(kind):
    """As the host does it for layers that it streams, and for hooks: in the activations' dtype."""
    part = make(kind, True)
    part["bias"] = part["bias"].to(BF16).float()
    module, layer = linear(kind, part, dtype=BF16)
    x, difference = activations(columns_of(kind)), torch.randn(48, columns_of(kind)) * 0.05
    module.weight_function = [lambda weight: weight + difference]
    assert rel(run(module, x), torch.nn.functional.linear(x, dequantized(layer) + difference, part["bias"])) < 1e-6


@pytest.mark.parametrize("kind", ["W4A4_DYNAMIC", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE", "W4A8_DYNAMIC"])
def test_a_patched_4_bit_weight_is_saved_as_it_acts(kind):
    """A difference is no factor: the layer becomes a plain one."""
    module, layer = linear(kind, make(kind, True))
    patcher, difference = patch(module, 0.02)
    saved = patcher.patch_weight_to_device("layer.weight", return_weight=True)
    assert is_tiled(module.weight)
    assert rel(saved, dequantized(layer) + difference) < 1e-6


@pytest.mark.parametrize("kind", OWN)
def test_a_requantized_weight_fits_in_the_hosts_buffer(kind):
    """Dynamic VRAM patches, requantizes and copies the result over the streamed weight."""
    part = make(kind, True)
    if kind == "W8A16":
        part["weight_offset"] = torch.full((48, 1), 3.0)
    module, layer = linear(kind, part)
    weight = module.weight.clone()
    weight.copy_(weight.requantize_from_float(dequantized(layer) * 2, scale="recalculate", stochastic_rounding=7))
    assert rel(weight.dequantize(), dequantized(layer) * 2) < (0.25 if kind.startswith("W4") else 0.05)
    assert torch.equal(module.weight.dequantize(), dequantized(layer))


def test_untouched_rows_survive_requantization():
    for kind in ("W8A8", "W8A8_MXFP8"):
        module, layer = linear(kind, make(kind, True))
        again = module.weight.requantize_from_float(module.weight.dequantize(), stochastic_rounding=0)
        assert rel(again.dequantize(), dequantized(layer)) < 1e-3


def test_patched_bias_of_a_static_layer_is_added_once():
    part = make("W8A8")
    module, _ = linear("W8A8", part)
    x = activations(128)
    before = run(module, x)
    module.bias = torch.nn.Parameter(module.bias + 3, requires_grad=False)
    assert torch.allclose(run(module, x), before + 3, atol=1e-6)


def test_stochastic_rounding_is_right_on_average():
    values = torch.full((4096,), 1.0625 / 16) + torch.linspace(0, 0.004, 4096)
    for mantissa, lowest, cast in ((3, -6, lambda v: v.to(mx.E4M3).float()),
                                   (1, 0, lambda v: mx.decode_e2m1(mx.encode_e2m1(v, False)))):
        mean = torch.stack([cast(mx.dither(values, mantissa, lowest, seed)) for seed in range(1, 201)]).mean()
        assert abs(float(mean - values.mean())) < 4e-4  # 0.25 / sqrt(12 * 800000) for E2M1's step of 0.5


def test_online_mxfp8_takes_the_hosts_layout_and_runs_everywhere():
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).to(BF16)
    codes, scale = mx.quantize_weight(weight)
    layer = native("W8A8_MXFP8", {"weight": codes, "weight_scale": scale})
    assert layer.layout == "mxfp8" and "bias" not in layer.tensors
    assert np.array_equal(dequantized(layer).numpy(), ascend.from_mx(*ascend.mx(weight.float().numpy(), "e4m3"), "e4m3"))


def test_an_unknown_codec_in_a_saved_model_is_an_error():
    from quantized_transformers.quant.marker import marker

    module, layer = linear("W8A8", make("W8A8"))
    conf = json.loads(bytes(layer.tensors["comfy_quant"].tolist()))
    conf["tiles"][0]["codec"] = "w1a1"
    with pytest.raises(ValueError, match="w1a1"):
        module.load_state_dict(dict(layer.tensors) | {"comfy_quant": marker(conf)})


def test_a_static_bias_is_added_once_whatever_the_input_is():
    part = make("W8A8")
    module, _ = linear("W8A8", part)
    big = activations(256).reshape(2, 8, 256)
    x = big[..., :128]
    expected = run(module, x.contiguous())
    with torch.no_grad():
        assert torch.equal(module(x), expected) and torch.equal(module(big[..., :128].contiguous()[:, :5]), expected[:, :5])

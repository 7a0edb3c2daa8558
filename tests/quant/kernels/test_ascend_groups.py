"""Integers with groups on Ascend: what npu_weight_quant_batchmatmul gets of AWQ, GPTQ, AutoRound and compressed-tensors, by
their tools' formulas (support/packed.py) and a stand-in that computes by the operator's documentation."""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.host import Machine
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.ascend import groups
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.codecs.groups import tile
from quantized_transformers.quant.kernels import kernel
from quantized_transformers.quant.kernels.base import Activation, dense
from quantized_transformers.quant.kernels.choose import Wanted, choose
from quantized_transformers.quant.kernels.torch_npu import OPS, DeviceFacts
from quantized_transformers.quant.layouts.join import join
from support import packed
from support.ascend_net import operations
from support.fake_torch_npu import FakeTorchNPU, NPUError, install

pytestmark = pytest.mark.unit

NPU = kernel("torch_npu")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def weight(rows=48, columns=128):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * 0.05


def made(bits=4, size=32, rows=48, columns=128, order=None, **how):
    """(a tile, the weight it means, the scales)"""
    codes, zero, scale, meant = packed.grouped(weight(rows, columns), bits, size or columns, order=order,
                                               **{"zeros": True, "scale_dtype": F16, **how})
    return tile("p", codes, scale, bits=bits, zero=zero, group=order), meant, scale


def activations(columns=128, dtype=BF16):
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def run(x, one, bias=None):
    return NPU.linear(Activation(x), NPU.ordered(one), bias)


KINDS = {"W4A16": {}, "W4A16, 64 columns": {"size": 64}, "W4A16, a row": {"size": 0}, "W4A16, symmetric": {"zeros": False},
         "W4A16, negative scales": {"negative": True}, "W4A16, BF16 scales": {"scale_dtype": BF16},
         "W3A16": {"bits": 3}, "W8A16": {"bits": 8}, "W8A16, a row": {"bits": 8, "size": 0, "zeros": False},
         "W8A16, 12 rows": {"bits": 8, "rows": 12}}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_gets_the_weight_that_the_file_means(monkeypatch, kind, dtype):
    """Within one rounding of the output, and of each scale where its dtype is not that of x."""
    fake = install(monkeypatch, soc=220)
    one, meant, scale = made(**KINDS[kind])
    x, bias = activations(dtype=dtype), torch.randn(len(meant), generator=torch.Generator().manual_seed(6)).to(BF16)
    out = run(x, one, bias.to(dtype))
    seen = x.to(BF16) if dtype == F32 else x
    exact = seen.double() @ meant.double().t() + bias.double()
    eps = torch.finfo(seen.dtype).eps / 2
    rounded = 0 if scale.dtype in (seen.dtype, BF16) else eps  # F16 has BF16's numbers of this size
    bound = eps * exact.abs() + rounded * (seen.double().abs() @ meant.double().abs().t()) * (1 + eps)
    assert out.dtype == dtype and fake.calls == [groups.OP]
    assert bool(((out.double() - exact).abs() <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_the_operators_and_comes_back(kind):
    """int4 is packed as npu_convert_weight_to_int4pack packs it."""
    one, meant, _ = made(**KINDS[kind])
    turned, own = NPU.ordered(one), codec(one.place.codec)
    assert turned.place.order == "torch_npu" and turned["codes"].is_contiguous()
    if one.place.codec == "u4_groups":
        low, high = one["codes"] & 15, one["codes"] >> 4
        signed = torch.stack((low, high), -1).flatten(1).to(torch.int32) - 8
        assert torch.equal(turned["codes"], FakeTorchNPU(soc=220).npu_convert_weight_to_int4pack(signed.t().contiguous()))
    back = own.natural(turned)
    assert back.place == one.place and all(torch.equal(back[name], one[name]) for name in one.fields)
    assert torch.equal(own.dequantize(turned, F32), meant)
    assert torch.equal(kernel("").ordered(turned)["codes"], one["codes"])  # on any other machine


REFUSED = {
    "act order": ({"order": packed.act_order(128, 32)}, "columns in an order of their own"),
    "groups of 16": ({"size": 16}, "groups of 16 columns"), "groups of 24": ({"size": 24, "columns": 72}, "groups of 24 columns"),
    "12 rows": ({"rows": 12}, "12 rows, not a multiple of 8")}
CHANGED = {
    "a float offset": (lambda t: t.having(offset=t["scale"]), "a float offset"),
    "zero points that are no codes": (lambda t: t.having(zero=t["zero"] + 0.5), "zero points that are no codes"),
    "a scale too large": (lambda t: t.having(scale=t["scale"].float() * 1e8), "scales that F16 does not hold"),
    "a scale too small": (lambda t: t.having(scale=t["scale"].float() * 1.2345e-6), "scales that F16 does not hold")}


@pytest.mark.parametrize("name", [*REFUSED, *CHANGED])
def test_what_the_operator_does_not_take_is_dequantized(monkeypatch, name):
    fake = install(monkeypatch, soc=220)
    how, why = REFUSED.get(name, ({}, ""))
    one = made(**how)[0]
    if name in CHANGED:
        change, why = CHANGED[name]
        one = change(one)
    assert NPU.refuses(one).startswith(why) and NPU.ordered(one) is one
    x = activations(one.place.columns)
    assert torch.equal(run(x, one), dense(x, one, None)) and not fake.calls


def test_an_expert_without_a_token(monkeypatch):
    fake = install(monkeypatch, soc=220)
    assert run(activations()[:0], made()[0]).shape == (0, 48) and not fake.calls


def test_a_low_rank_branch_is_added(monkeypatch):
    """SDNQ's int4 with SVD."""
    install(monkeypatch, soc=220)
    one, meant, _ = made()
    down, up = torch.randn(128, 4) * 0.1, torch.randn(48, 4) * 0.1
    x = activations(dtype=F16)
    exact = x.double() @ (meant + up @ down.t()).double().t()
    assert float((run(x, one.having(down=down, up=up)).double() - exact).abs().max() / exact.abs().max()) < 2 ** -9


def test_a_layer_of_the_host_is_saved_in_this_order_and_runs_elsewhere(monkeypatch):
    fake = install(monkeypatch, soc=220)
    one, meant, _ = made()
    given = join([one], ["p"], (48, 128)).tensors
    module = operations("torch_npu", BF16).Linear(128, 48, bias=False, device="cpu", dtype=BF16)
    module.load_state_dict(dict(given))
    with torch.inference_mode():
        out = module(activations().reshape(1, 5, 128))
    assert out.shape == (1, 5, 48) and fake.calls == [groups.OP]
    saved = module.state_dict()
    assert json.loads(bytes(saved["comfy_quant"].tolist()))["tiles"][0]["order"] == "torch_npu"
    other = operations("reference", F32).Linear(128, 48, bias=False, device="cpu", dtype=F32)
    other.load_state_dict(saved)
    with torch.inference_mode():
        x = activations(dtype=F32)
        exact = x.double() @ meant.double().t()
        assert ((other(x) - exact).abs() <= 2 * 128 * 2.0 ** -24 * (x.double().abs() @ meant.double().abs().t())).all()


def on(generation="A2", cann="8.5.0", ops=frozenset(OPS)):
    return Machine("npu", "here", found={"torch_npu": DeviceFacts(True, generation, cann, "2.14.0", "", ops)})


CHOICES = [
    (on(), "torch_npu", "CANN 8.5.0; activations stay whole, scales are rounded to 16 bits"), (on("A3"), "torch_npu", "A3"),
    (on("A5"), "", "UINT4 (groups) needs an Ascend A2 or A3, this NPU is A5; weights stay quantized"),
    (on(cann="8.0.RC1"), "", "UINT4 (groups) needs CANN 8.0.RC2 or newer"), (on(ops=frozenset()), "", f"has no {groups.OP}")]


@pytest.mark.parametrize(("machine", "name", "words"), CHOICES)
def test_the_choice(machine, name, words):
    choice = choose(Wanted(), ["u4_groups"], machine)
    assert choice.kernels == {"u4_groups": name} and words in choice.lines[0]


def test_native_would_quantize_activations():
    with pytest.raises(CheckpointError, match=r"nothing multiplies UINT8 \(groups\) layers quantized"):
        choose(Wanted("native"), ["u8_groups"], on())


def call(**change):
    return {"x": torch.ones(2, 64, dtype=BF16), "weight": torch.zeros(64, 1, dtype=torch.int32),
            "antiquant_scale": torch.ones(2, 8, dtype=BF16), "antiquant_offset": torch.ones(2, 8, dtype=BF16),
            "antiquant_group_size": 32} | change


@pytest.mark.parametrize(("change", "says"), [
    ({"x": torch.ones(2, 64)}, "16 bits"), ({"x": torch.ones(0, 64, dtype=BF16)}, "not empty"),
    ({"x": torch.ones(2, 32, dtype=BF16)}, "k of x"), ({"weight": torch.zeros(64, 8, dtype=torch.uint8)}, "int8"),
    ({"antiquant_group_size": 16}, "antiquant_group_size"), ({"antiquant_group_size": 64}, "antiquant_group_size"),
    ({"antiquant_scale": torch.ones(2, 8, dtype=F16)}, "antiquant_scale"), ({"antiquant_scale": torch.ones(8, dtype=BF16)}, "scale"),
    ({"antiquant_offset": torch.ones(2, 8)}, "antiquant_offset"), ({"bias": torch.ones(8, dtype=BF16)}, "bias"),
    ({"group": 32}, "no argument group")])
def test_the_fake_refuses_what_the_real_one_does(change, says):
    FakeTorchNPU(soc=220).npu_weight_quant_batchmatmul(**call())
    with pytest.raises(NPUError, match=says):
        FakeTorchNPU(soc=220).npu_weight_quant_batchmatmul(**call(**change))

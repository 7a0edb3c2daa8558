"""Nunchaku's files against diffusers: weights by value, layers by the activation rule, forwards last.

The files are packed by tests/support from closed formulae; what they stand for is computed there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from support import common, flux, qwen_image, z_image
from support import svdquant_models as models
from support.svdquant_case import FORWARD, Case

pytestmark = pytest.mark.parity

ROUNDING = 1e-6  # F32 arithmetic of a weight's definition


def rows(block: str, *names: str) -> list[str]:
    return [f"{block}.{name}" for name in names]


DOUBLE, SINGLE, QWEN, LAYER, REFINER = ("transformer_blocks.0", "single_transformer_blocks.0", "transformer_blocks.0",
                                        "layers.0", "noise_refiner.1")
LAYERS: dict[str, dict[str, list[str]]] = {
    "flux": {"double_blocks.0.img_attn.qkv": rows(DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"),
             "double_blocks.0.txt_attn.qkv": rows(DOUBLE, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
             **{f"double_blocks.0.{name}": rows(DOUBLE, theirs) for name, theirs in (
                 ("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out"), ("img_mlp.0", "ff.net.0.proj"),
                 ("img_mlp.2", "ff.net.2"), ("txt_mlp.0", "ff_context.net.0.proj"), ("txt_mlp.2", "ff_context.net.2"),
                 ("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear"))},
             "single_blocks.0.modulation.lin": rows(SINGLE, "norm.linear"),
             "single_blocks.0.linear1": rows(SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
             "single_blocks.0.linear2": rows(SINGLE, "proj_out")},
    "qwen": {f"{QWEN}.{name}": rows(QWEN, name) for name in (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0",
        "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1",
        "txt_mod.1")},
    "z": {"layers.0.attention.qkv": rows(LAYER, "attention.to_q", "attention.to_k", "attention.to_v"),
          "layers.0.attention.out": rows(LAYER, "attention.to_out.0"),
          **{f"layers.0.feed_forward.{w}": rows(LAYER, f"feed_forward.{w}") for w in ("w1", "w2", "w3")}},
}
LAYERS["z with refiners"] = {**LAYERS["z"], "noise_refiner.1.feed_forward.w1": rows(REFINER, "feed_forward.w1")}
CASES = {
    "flux int4": (lambda: models.make_flux(), flux, nullcontext, LAYERS["flux"]),
    "flux nvfp4": (lambda: models.make_flux("nvfp4", rank=32), flux, nullcontext, LAYERS["flux"]),
    # two layers: the text of the last one goes nowhere
    "qwen int4": (lambda: models.make_qwen_image(rank=48, layers=2), qwen_image, qwen_image.small_widths, LAYERS["qwen"]),
    "qwen nvfp4": (lambda: models.make_qwen_image("nvfp4"), qwen_image, qwen_image.small_widths, LAYERS["qwen"]),
    "z int4": (lambda: models.make_z_image(), z_image, z_image.small_widths, LAYERS["z"]),
    "z nvfp4": (lambda: models.make_z_image("nvfp4", refiners=True), z_image, z_image.small_widths,
                LAYERS["z with refiners"]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Iterator[Case]:
    make, support, context, layers = CASES[request.param]
    made = make()
    with context():
        yield Case(made, made.write(tmp_path_factory.mktemp("svdq")), support, layers)


INT4 = pytest.mark.parametrize("case", [name for name in CASES if "int4" in name], indirect=True)  # the CPU has no NVFP4


def native(patcher: Any, name: str) -> Any:
    return patcher.get_model_object(f"diffusion_model.{name}")


def test_every_weight_and_bias_is_its_definition(case):
    """The host's own table gives the native names of diffusers' tensors; biases are the stored ones."""
    import comfy.model_detection

    patcher = case.load().patcher
    network = case.made.dequantized()
    with torch.no_grad():
        for name in case.made.linears:
            if network.get_submodule(name).bias is not None:
                network.get_submodule(name).bias.copy_(case.made.bias(name, plain=False))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = tensors if case.support is qwen_image else comfy.model_detection.convert_diffusers_mmdit(tensors)
    seen = 0
    for name, module in patcher.model.diffusion_model.named_modules():
        if not hasattr(getattr(module, "weight", None), "_layout_cls"):
            continue
        seen += 1
        wanted = expected[f"{name}.weight"]
        assert common.rel_l2(module.weight.dequantize(), wanted) < ROUNDING, name
        if module.bias is None:
            assert f"{name}.bias" not in expected
        else:
            assert common.rel_l2(module.bias, expected[f"{name}.bias"]) < ROUNDING, name
    quantized = {name for name in case.made.linears}
    assert seen == len(quantized) - (len(expected_fused(case)) if case.support is not qwen_image else 0)


def expected_fused(case: Case) -> list[str]:
    """The diffusers Linears that a native one takes in beside its first."""
    joined = (".attn.to_k", ".attn.to_v", ".attn.add_k_proj", ".attn.add_v_proj", ".attention.to_k", ".attention.to_v",
              ".proj_mlp")
    return [name for name in case.made.linears if name.endswith(joined)]


def test_dequantized_forward_equals_diffusers(case):
    loaded = case.load(backend="dequantize")
    assert common.rel_l2(case.run(loaded.patcher), case.reference(case.made.dequantized())) < FORWARD
    assert ": dequantize (as chosen)" in loaded.report


@INT4
def test_int4_layers_are_the_activation_rule(case):
    """comfy-kitchen's kernels against the exact emulation, layer by layer: unsigned, composite, fused and AWQ ones."""
    import comfy.model_management

    patcher = case.load(backend="comfy_kitchen").patcher
    comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(3)
    for name, linears in case.layers.items():
        module = native(patcher, name)
        parts = [case.made.numbers(linear) for linear in linears]
        widths = [part.residual.shape[1] for part in parts[0]]
        x = torch.randn(5, sum(widths), generator=g)
        columns = x.split(widths, dim=-1)
        expected = torch.cat([torch.stack([part.forward(own) for part, own in zip(each, columns, strict=True)]).sum(0)
                              for each in parts], dim=-1)
        with torch.inference_mode():
            assert common.rel_l2(module(x), expected) < FORWARD, name


@INT4
def test_int4_forward_is_the_activation_rule(case):
    """Over a whole model, each layer's definition of what that layer was given."""
    loaded = case.load(backend="comfy_kitchen")
    seen = models.given(loaded.patcher)
    out = case.run(loaded.patcher)
    assert common.rel_l2(out, case.reference(case.made.emulated(seen))) < FORWARD
    assert common.rel_l2(out, case.reference(case.made.dequantized())) > 0.02  # and it is not the dequantized model
    assert ": comfy_kitchen (as chosen)" in loaded.report


def test_report(case):
    text = case.load().report
    int4 = "int4" in case.path.name
    counts = {"flux": (12, 3), "qwen_image": (16, 4) if int4 else (8, 2), "z_image": (4 if int4 else 20, 0)}
    w4a4, awq = counts[case.support.__name__.rpartition(".")[2]]
    rank = next(t.shape[1] for name, t in case.made.tensors.items() if name.endswith(("lora_down", "proj_down")))
    for line in (f"svdquant-{'int4' if int4 else 'nvfp4'}", f"low rank: {rank}", ": dequantize (chosen for this device)",
                 f"{w4a4} SVDQ {'INT4' if int4 else 'NVFP4'}"):
        assert line in text, text
    assert (f"{awq} AWQ INT4" in text) == bool(awq)
    assert "note:" not in text.replace("note: zero_cond_t", ""), text  # a published file has nothing to warn of

"""A LoRA by the host's own LoraLoaderModelOnly: the FP8 model changes as the BF16 model does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from support import flux
from support import lora as lora_tools

pytestmark = pytest.mark.parity

TARGETS = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.attn.add_v_proj": (256, 256),
           "transformer_blocks.1.ff.net.2": (256, 1024), "single_transformer_blocks.0.attn.to_k": (256, 256),
           "single_transformer_blocks.0.proj_mlp": (1024, 256), "single_transformer_blocks.1.proj_out": (256, 1280),
           "proj_out": (64, 256)}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> dict[str, torch.Tensor]:
    """A rank-8 LoRA in diffusers' (PEFT) names, on split, fused and single layers."""
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (out, inner) in TARGETS.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(8, inner, generator=g) * inner ** -0.5
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 8, generator=g) * 8 ** -0.5
    return tensors


@pytest.fixture(scope="module")
def load_lora(lora, tmp_path_factory):
    """The host's node, on a file in a loras folder."""
    import folder_paths

    from nodes import LoraLoaderModelOnly

    folder = tmp_path_factory.mktemp("loras")
    save_file(lora, str(folder / "tiny.safetensors"))
    folder_paths.add_model_folder_path("loras", str(folder))
    return lambda patcher, strength: LoraLoaderModelOnly().load_lora_model_only(patcher, "tiny.safetensors", strength)[0]


def merged(folder, lora) -> torch.Tensor:
    """diffusers' forward with the LoRA merged into the weights by its definition, W + B A, in F32."""
    tensors = flux.dequantize(flux.stored(folder))
    for name in TARGETS:
        a, b = (lora[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + b @ a
    return flux.diffusers_velocity(flux.emulate(tensors, flux.config_of(folder)), **flux.inputs())


def full(patcher):
    return flux.comfy_velocity(patcher, **flux.inputs())


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: flux.comfy_velocity(p, load=False, **flux.inputs()))


@pytest.mark.parametrize("mode", [full, low_vram])
@pytest.mark.parametrize("which", ["fp8", "mixed"])
def test_effect_is_that_on_bf16(mode, which, tiny, lora, load_lora):
    base = model.load(model.Request(str(tiny.bf16)), quiet=True).patcher
    fp8 = model.load(model.Request(str(getattr(tiny, which))), quiet=True).patcher
    effect = full(load_lora(base, 1.0)) - full(base)
    before = mode(fp8)
    quantized = mode(load_lora(fp8, 1.0)) - before
    assert effect.norm() > 0.3 * full(base).norm()  # large against rounding
    assert abs(float(quantized.norm() / effect.norm()) - 1) < 0.05
    cosine = float((quantized.double() * effect.double()).sum() / (quantized.double().norm() * effect.double().norm()))
    assert cosine > 0.99
    assert torch.equal(mode(fp8), before)  # and it can be taken off again


def test_low_vram_is_the_definition(tiny, lora, load_lora):
    """Patched when the layer runs there is no requantization: exactly W_dequantized + B A."""
    patcher = load_lora(model.load(model.Request(str(tiny.fp8)), quiet=True).patcher, 1.0)
    assert flux.rel_l2(low_vram(patcher), merged(tiny.fp8, lora)) < 1e-5


def test_bf16_is_the_definition(tiny, lora, load_lora):
    patcher = load_lora(model.load(model.Request(str(tiny.bf16)), quiet=True).patcher, 1.0)
    assert flux.rel_l2(full(patcher), merged(tiny.bf16, lora)) < 1e-5


def test_a_lora_before_the_override(tiny, load_lora):
    """On a deferred base, too: the patch moves to the override's weights."""
    deferred = model.defer(model.Request(str(tiny.bf16))).patcher
    early = model.override(load_lora(deferred, 1.0), model.Request(str(tiny.fp8))).patcher
    late = load_lora(model.load(model.Request(str(tiny.fp8)), quiet=True).patcher, 1.0)
    assert torch.equal(low_vram(early), low_vram(late))

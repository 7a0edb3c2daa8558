"""Checkpoints that must not load: each names what is wrong, where, and what to do. None may become a model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from support import flux

pytestmark = pytest.mark.unit

Q = "transformer_blocks.0.attn.to_q"
PROJ = "transformer_blocks.1.attn.to_out.0"


def put(name, value):
    return lambda t, c, m: t.__setitem__(name, value)


def drop(name):
    return lambda t, c, m: t.pop(name)


def declare(**entries):
    return lambda t, c, m: c["quantization_config"].update(entries)


def change(name, function):
    return lambda t, c, m: t.__setitem__(name, function(t[name]))


REFUSED = {
    "FP8 weight without scale": (drop(f"{PROJ}.weight_scale"), f"{PROJ}: FP8 weight without weight_scale"),
    "scale of wrong shape": (change(f"{Q}.weight_scale", lambda s: s.repeat(3)), f"{Q}: the scale is [3]"),
    "input scale of wrong shape": (change(f"{Q}.input_scale", lambda s: s.repeat(2)), f"{Q}: input_scale is [2]"),
    "scale of wrong dtype": (change(f"{Q}.weight_scale", lambda s: s.to(torch.int32)), f"{Q} is stored as"),
    "input scale of wrong dtype": (change(f"{Q}.input_scale", lambda s: s.to(torch.int32)), "input_scale is I32"),
    "scale NaN": (put(f"{Q}.weight_scale", torch.tensor(math.nan)), f"{Q}.weight_scale is nan"),
    "scale infinite": (put(f"{Q}.weight_scale", torch.tensor(math.inf)), f"{Q}.weight_scale is inf"),
    "scale zero": (put(f"{Q}.weight_scale", torch.tensor(0.0)), f"{Q}.weight_scale is 0.0"),
    "scale negative": (put(f"{Q}.weight_scale", torch.tensor(-0.5)), f"{Q}.weight_scale is -0.5"),
    "input scale NaN": (put(f"{PROJ}.input_scale", torch.tensor(math.nan)), f"{PROJ}.input_scale is nan"),
    "input scale zero": (put(f"{PROJ}.input_scale", torch.tensor(0.0)), f"{PROJ}.input_scale is 0.0"),
    "extra tensor": (put("mystery.weight", torch.ones(3)), "unexpected tensors: mystery.weight"),
    "extra tensor without a module": (put("mystery", torch.ones(3)), "unexpected tensors: mystery"),
    "extra companion": (put(f"{Q}.zero_point", torch.ones(1)), f"unexpected tensors: {Q}.zero_point"),
    "AWQ smoothing": (put(f"{Q}.pre_quant_scale", torch.ones(256)), f"unexpected tensors: {Q}.pre_quant_scale"),
    "missing weight": (drop(f"{Q}.weight"), f"missing tensor {Q}.weight"),
    "missing bias": (drop(f"{Q}.bias"), f"missing tensor {Q}.bias"),
    "missing norm": (drop("transformer_blocks.0.attn.norm_q.weight"), "missing tensor transformer_blocks.0.attn.norm_q"),
    "missing embedder": (drop("x_embedder.weight"), "x_embedder.weight"),
    "missing module": (lambda t, c, m: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.")], f"missing tensor {Q}.weight"),
    "missing block": (lambda t, c, m: [t.pop(n) for n in list(t) if n.startswith("transformer_blocks.1.")],
                      "config.json says double = 2, but the tensors have 1"),
    "gap in the blocks": (lambda t, c, m: [t.pop(n) for n in list(t) if n.startswith("transformer_blocks.0.")],
                          "1 blocks transformer_blocks.N are there, and not those of the numbers 0"),
    "transposed weight": (change("transformer_blocks.0.ff.net.2.weight", lambda w: w.t().contiguous()), "(transposed)"),
    "reshaped weight": (change(f"{PROJ}.weight", lambda w: w.reshape(128, 512)), f"{PROJ}: weight is [128, 512]"),
    "reshaped bias": (change(f"{Q}.bias", lambda b: b[:100]), f"{Q}.bias is [100], expected [256]"),
    "bias in INT8": (change(f"{Q}.bias", lambda b: b.to(torch.int8)), f"{Q}.bias is stored as I8"),
    "weight retyped to bytes": (change(f"{Q}.weight", lambda w: w.view(torch.uint8)), f"{Q} is stored as U8"),
    "INT8": (change(f"{Q}.weight", lambda w: w.view(torch.int8)), f"{Q} is stored as INT8, and the file declares modelopt-fp8"),
    "E5M2": (change(f"{Q}.weight", lambda w: w.float().to(torch.float8_e5m2)), f"{Q}: E5M2 weight, and the file declares ModelOpt's FP8"),
    "block-wise FP8": (put(f"{Q}.weight_scale_inv", torch.ones(2, 2)), f"{Q}: weight_scale and weight_scale_inv"),
    "NVFP4 without its tensor scale": (lambda t, c, m: t.update({f"{Q}.weight": torch.zeros(256, 128, dtype=torch.uint8), f"{Q}.weight_scale":
                                       torch.zeros(256, 16, dtype=torch.float8_e4m3fn)}), f"{Q}: NVFP4 weight without weight_scale_2"),
    "config of another size": (lambda t, c, m: c.update(num_attention_heads=3), "hidden = 384, but the tensors have 256"),
    "config with other heads": (lambda t, c, m: c.update(attention_head_dim=64, num_attention_heads=4), "heads of 128"),
    "config of another class": (lambda t, c, m: c.update(_class_name="WanTransformer3DModel"),
                                "config.json says WanTransformer3DModel, but the tensors are FLUX.1"),
    "config declares W4A8": (declare(quant_algo="W4A8_AWQ"), "ModelOpt W4A8_AWQ is not supported"),
    "mixed precision": (declare(quant_algo="MIXED_PRECISION"), "MIXED_PRECISION is not supported"),
    "unknown method": (declare(quant_method="hqq"), "'hqq' is not supported"),
    "method against algo": (declare(quant_method="modelopt_fp8", quant_algo="MXFP8"), "conflicting declarations"),
    "block size declared": (declare(weight_block_size=[100, 128]), "weight_block_size [100, 128] is not supported"),
    "unknown activation scheme": (declare(activation_scheme="often"), "unknown activation_scheme"),
    "dynamic declared, static stored": (declare(quant_method="fp8", activation_scheme="dynamic"),
                                        "declared dynamic, but 47 layers carry a static input_scale"),
    "config against metadata": (lambda t, c, m: m.update(quantization_config=json.dumps({"quant_algo": "NVFP4"})),
                                "conflicting quantization declarations: quant_algo"),
    "metadata against metadata": (lambda t, c, m: m.update(
        quantization_config='{"x": {"y": 1}}', _quantization_metadata='{"x": {"y": 2}}'), "declarations: x.y"),
    "metadata that is no JSON": (lambda t, c, m: m.update(quantization_config="{oops"), "invalid quantization_config"),
    "metadata that is no object": (lambda t, c, m: m.update(quantization_config="[1]"), "is no JSON object"),
    "layer metadata against tensors": (lambda t, c, m: m.update(_quantization_metadata=json.dumps(
        {"format_version": "1.0", "layers": {Q: {"format": "nvfp4"}}})), f"declares {Q} as nvfp4"),
    "marker against tensors": (put(f"{Q}.comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)),
                               "says format 'nvfp4'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tiny, tmp_path):
    mutate, expected = REFUSED[name]
    tensors, config, metadata = flux.stored(tiny.fp8), flux.config_of(tiny.fp8), {"format": "pt"}
    mutate(tensors, config, metadata)
    folder = flux.save(tmp_path / "mutated", tensors, config, metadata)
    with pytest.raises(CheckpointError) as caught:
        model.load(model.Request(str(folder)), quiet=True)
    text = str(caught.value)
    assert expected in text, text
    assert "where:" in text and "what to do:" in text, text


OTHERS = {
    "a LoRA": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)},
    "a text encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)},
    "a text encoder ": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "shared.weight": (8, 8)},
    "a text encoder  ": {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.embed_tokens.weight": (8, 8)},
    "a VAE": {"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)},
    "a ControlNet": {"controlnet_x_embedder.weight": (8, 8), "single_transformer_blocks.0.proj_mlp.weight": (8, 8)},
    "an incomplete or modified Stable Diffusion UNet": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "Wan VACE": {"vace_blocks.0.attn1.to_q.weight": (8, 8), "patch_embedding.weight": (8, 4, 1, 2, 2)},
    "Wan S2V": {"casual_audio_encoder.weights": (1, 2), "blocks.0.self_attn.q.weight": (8, 8)},
    "Chroma": {"distilled_guidance_layer.layers.0.in_layer.weight": (8, 8), "x_embedder.weight": (8, 8)},
    "Stable Diffusion 3": {"pos_embed.proj.weight": (8, 4, 2, 2), "transformer_blocks.0.attn.add_q_proj.weight": (8, 8)},
    "a Nunchaku": {"transformer_blocks.0.qkv_proj.qweight": (8, 8), "transformer_blocks.0.qkv_proj.wscales": (8, 8)},
    "an unknown kind": {"foo.weight": (8, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_the_file_picked_by_mistake(name, tmp_path):
    folder = flux.save(tmp_path / "other", {k: torch.ones(s) for k, s in OTHERS[name].items()}, None)
    with pytest.raises(CheckpointError) as caught:
        model.load(model.Request(str(folder)), quiet=True)
    text = str(caught.value)
    assert f"this is {name.strip()}" in text and "FLUX.1" in text and "what to do:" in text, text


def test_a_damaged_file_leaves_nothing_loaded(tiny, tmp_path):
    tensors, config = flux.stored(tiny.fp8), flux.config_of(tiny.fp8)
    folder = flux.save(tmp_path / "cut", tensors, config)
    file = next(folder.glob("*.safetensors"))
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        model.load(model.Request(str(folder)), quiet=True)

"""Damage of every kind to real exports: each ends in the right numbers or in a named error, never in silent noise.

Run with -s to see the table. The few that no reader can tell from bytes are listed as such here and in the README.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from support import flux
from support.common import comfy_order

FF = "transformer_blocks.1.ff.net.2"
Q, K = (f"transformer_blocks.0.attn.to_{x}" for x in "qk")
REFUSED, RIGHT, UNDETECTABLE = "refused", "right", "undetectable"


def drop(*leaves):
    return lambda t, c, m, s: [t.pop(f"{Q}.{leaf}") for leaf in leaves]


def put(leaf, change, layer=Q):
    return lambda t, c, m, s: t.__setitem__(f"{layer}.{leaf}", change(t[f"{layer}.{leaf}"]))


def rename(old, new):
    return lambda t, c, m, s: t.__setitem__(new, t.pop(old))


def exchange(a, b, *leaves):
    def swap(t, c, m, s):
        for leaf in leaves:
            t[f"{a}.{leaf}"], t[f"{b}.{leaf}"] = t[f"{b}.{leaf}"], t[f"{a}.{leaf}"]
    return swap


def declare(**entries):
    return lambda t, c, m, s: c["quantization_config"].update(entries)


def flip_bits(weight):
    weight = weight.clone()
    weight.view(torch.uint8)[:64] ^= 1
    return weight


# name: (mutation of tensors, config, header metadata and the tensor-scale leaf; outcome)
MUTATIONS = {
    "weight dropped": (drop("weight"), REFUSED),
    "bias dropped": (drop("bias"), REFUSED),
    "weight scale dropped": (drop("weight_scale"), REFUSED),
    "tensor scale dropped": (lambda t, c, m, s: t.pop(f"{Q}.{s}"), REFUSED),
    "whole layer dropped": (lambda t, c, m, s: [t.pop(k) for k in list(t) if k.startswith(f"{Q}.")], REFUSED),
    "first block dropped": (lambda t, c, m, s: [t.pop(k) for k in list(t) if k.startswith("transformer_blocks.0.")], REFUSED),
    "last block dropped": (lambda t, c, m, s: [t.pop(k) for k in list(t) if k.startswith("single_transformer_blocks.1.")], REFUSED),
    "embedder dropped": (lambda t, c, m, s: t.pop("x_embedder.weight"), REFUSED),
    "norm dropped": (lambda t, c, m, s: t.pop("transformer_blocks.0.attn.norm_q.weight"), REFUSED),
    "weight renamed": (rename(f"{Q}.weight", f"{Q}.wieght"), REFUSED),
    "scale renamed": (lambda t, c, m, s: t.__setitem__(f"{Q}.scale_weight", t.pop(f"{Q}.{s}")), REFUSED),
    "layer renamed": (lambda t, c, m, s: [t.__setitem__(k.replace("to_q", "to_qq"), t.pop(k)) for k in list(t) if k.startswith(f"{Q}.")], REFUSED),
    "extra tensor": (lambda t, c, m, s: t.__setitem__("extra.weight", torch.ones(4)), REFUSED),
    "extra LoRA": (lambda t, c, m, s: t.__setitem__(f"{Q}.lora_A.weight", torch.ones(4, 256)), REFUSED),
    "extra smoothing scale": (lambda t, c, m, s: t.__setitem__(f"{Q}.pre_quant_scale", torch.ones(256)), REFUSED),
    "weight as INT8": (put("weight", lambda w: w.view(torch.int8)), REFUSED),
    "weight as E5M2": (put("weight", lambda w: w.view(torch.float8_e5m2)), REFUSED),
    "weight cast to BF16 codes": (put("weight", lambda w: w.to(torch.bfloat16)), REFUSED),
    "scale as integers": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", t[f"{Q}.{s}"].to(torch.int32)), REFUSED),
    "bias quantized": (put("bias", lambda b: b.to(torch.float8_e4m3fn)), REFUSED),
    "weight reshaped": (put("weight", lambda w: w.reshape(w.shape[0] // 2, -1)), REFUSED),
    "weight cut": (put("weight", lambda w: w[:-1]), REFUSED),
    "weight transposed": (put("weight", lambda w: w.t().contiguous(), FF), REFUSED),
    "bias cut": (put("bias", lambda b: b[:-1]), REFUSED),
    "scale per row": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", t[f"{Q}.{s}"].repeat(256)), REFUSED),
    "scale NaN": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", torch.tensor(float("nan"))), REFUSED),
    "scale zero": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", torch.tensor(0.0)), REFUSED),
    "scale negative": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", -t[f"{Q}.{s}"]), REFUSED),
    "scale infinite": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", torch.tensor(float("inf"))), REFUSED),
    "input scale NaN": (put("input_scale", lambda x: x * float("nan")), REFUSED),
    "input scale zero": (put("input_scale", lambda x: x * 0), REFUSED),
    "config of another width": (lambda t, c, m, s: c.update(num_attention_heads=4), REFUSED),
    "config of another depth": (lambda t, c, m, s: c.update(num_layers=3), REFUSED),
    "config of another class": (lambda t, c, m, s: c.update(_class_name="SD3Transformer2DModel"), REFUSED),
    "config without guidance": (lambda t, c, m, s: c.update(guidance_embeds=False), REFUSED),
    "declared W4A8": (declare(quant_algo="W4A8_AWQ"), REFUSED),
    "declared by another tool": (declare(quant_method="compressed-tensors"), REFUSED),
    "header contradicts config": (lambda t, c, m, s: m.update(quantization_config='{"quant_algo": "MXFP8"}'), REFUSED),
    "layer list contradicts bytes": (lambda t, c, m, s: m.update(_quantization_metadata=json.dumps(
        {"layers": {Q: {"format": "mxfp8"}}})), REFUSED),
    "marker contradicts bytes": (lambda t, c, m, s: t.__setitem__(f"{Q}.comfy_quant", torch.tensor(
        list(b'{"format": "mxfp8"}'), dtype=torch.uint8)), REFUSED),
    "two layers exchanged, other shapes": (exchange(Q, FF, "weight"), REFUSED),
    "file truncated": ("truncate", REFUSED),
    "file empty": ("empty", REFUSED),
    "file with trailing bytes": ("append", REFUSED),
    "second file beside it": ("twin", REFUSED),
    "config that is no JSON": ("config", REFUSED),

    "scales of shape [1]": (lambda t, c, m, s: t.update({k: v.reshape(1) for k, v in t.items() if v.ndim == 0}), RIGHT),
    "bias in F32": (put("bias", lambda b: b.float()), RIGHT),
    "norm in F32": (lambda t, c, m, s: t.update({k: v.float() for k, v in t.items() if "norm_q" in k}), RIGHT),
    "input scale dropped": (drop("input_scale"), RIGHT),
    "no declaration": (lambda t, c, m, s: c.pop("quantization_config"), RIGHT),
    "no config": (lambda t, c, m, s: c.clear(), RIGHT),
    "wrong ignore list": (declare(ignore=["transformer_blocks.*"]), RIGHT),
    "other producer": (declare(producer={"name": "somebody"}), RIGHT),
    "unknown metadata": (lambda t, c, m, s: m.update(something="else"), RIGHT),
    "tensors in another order": (lambda t, c, m, s: [t.__setitem__(k, t.pop(k)) for k in sorted(t, reverse=True)], RIGHT),

    "q and k exchanged": (exchange(Q, K, "weight", "weight_scale"), UNDETECTABLE),
    "bits flipped in codes": (put("weight", flip_bits), UNDETECTABLE),
    "scale doubled": (lambda t, c, m, s: t.__setitem__(f"{Q}.{s}", t[f"{Q}.{s}"] * 2), UNDETECTABLE),
    "bias negated": (put("bias", lambda b: -b), UNDETECTABLE),
}
ONLY_NVFP4 = {
    "block scales dropped to one": (put("weight_scale", lambda b: b[:1, :1].contiguous()), REFUSED),
    "block scales cut": (put("weight_scale", lambda b: b[:, :-1].contiguous()), REFUSED),
    "block scales as U8": (put("weight_scale", lambda b: b.view(torch.uint8)), REFUSED),
    "ComfyUI's byte order, with its markers": (lambda t, c, m, s: [t.update(comfy_order(t)), t.update(
        {k.replace(s, "comfy_quant"): torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
         for k in list(t) if k.endswith(s)})], RIGHT),
    "nibbles swapped, declared": (lambda t, c, m, s: [t.update({k: v for k, v in comfy_order(t).items()
                                  if k.endswith(".weight")}), c["quantization_config"].update(swap_weight_nibbles=True)], RIGHT),
    "nibbles swapped, undeclared": (lambda t, c, m, s: t.update(
        {k: v for k, v in comfy_order(t).items() if k.endswith(".weight")}), UNDETECTABLE),
}
FAMILIES = {"fp8": ("weight_scale", MUTATIONS), "nvfp4": ("weight_scale_2", {**MUTATIONS, **ONLY_NVFP4})}


def damage_file(how, folder):
    file = next(folder.glob("*.safetensors"))
    if how == "truncate":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "append":
        file.write_bytes(file.read_bytes() + b"1234")
    elif how == "twin":
        shutil.copy(file, folder / "another.safetensors")
    elif how == "config":
        (folder / "config.json").write_text("{")


@pytest.fixture(scope="module")
def baseline(tiny):
    """What the undamaged exports give; equal to diffusers' forward of the dequantized weights (test_flux1, test_nvfp4)."""
    return {family: flux.comfy_velocity(model.load(model.Request(str(getattr(tiny, family))), quiet=True).patcher,
                                        **flux.inputs()) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutation_ends_right_or_refused(family, tiny, tmp_path, baseline):
    scale, mutations = FAMILIES[family]
    assert len(mutations) >= 25
    table, wrong = [], []
    for name, (mutate, expected) in mutations.items():
        tensors, config, metadata = flux.stored(getattr(tiny, family)), flux.config_of(getattr(tiny, family)), {}
        if not isinstance(mutate, str):
            mutate(tensors, config, metadata, scale)
        folder = flux.save(tmp_path / name, tensors, config or None, {"format": "pt", **metadata})
        if isinstance(mutate, str):
            damage_file(mutate, folder)
        try:
            loaded = model.load(model.Request(str(folder)), quiet=True)
            difference = flux.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), baseline[family])
            outcome, said = (RIGHT if difference < 1e-6 else UNDETECTABLE), f"differs by {difference:.2g}"
        except CheckpointError as error:
            outcome, said = REFUSED, " ".join(str(error).split("\n  ")[:2])
            if "where:" not in str(error) or "what to do:" not in str(error):
                wrong.append(f"{name}: the message lacks where or what to do: {error}")
        table.append(f"  {family:6} {name:40} {outcome:13} {said[:110]}")
        if outcome != expected:
            wrong.append(f"{name}: {outcome}, expected {expected} ({said})")
        shutil.rmtree(folder)
    print("\n" + "\n".join(table))
    assert not wrong, "\n".join(wrong)

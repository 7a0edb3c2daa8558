"""Tiny FLUX.1 files as people have them: the same weights under every name and in every company; and what they mean."""

from __future__ import annotations

import json
from typing import Any

import torch

from quantized_transformers.loaders import model

from . import common, flux
from . import lora as lora_tools

EXACT = 1e-5  # two F32 runs of one network
WHOLE = "model.diffusion_model."
BESIDE = {"text_encoders.clip_l.logit_scale": torch.tensor(4.6), "vae.decoder.conv_in.weight": torch.ones(4, 4, 3, 3),
          "text_encoders.t5xxl.transformer.shared.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
          "model_ema.decay": torch.ones(())}
NAMES = {"native": "", "native, whole": WHOLE, "diffusers": "", "diffusers, whole pipeline": "transformer.",
         "native, compiled": "module._orig_mod."}


def weights_of(tiny: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The tiny FLUX.1 in F32 by style: diffusers' names, and the vendor's by ComfyUI's own converter."""
    import comfy.model_detection

    diffusers = {name: tensor.float() for name, tensor in common.stored(tiny.bf16).items()}
    native = comfy.model_detection.convert_diffusers_mmdit(dict(diffusers))
    return {"diffusers": diffusers, "native": {name.replace("_norm.weight", "_norm.scale"): t for name, t in native.items()}}


def linears(tensors):
    return [name.removesuffix(".weight") for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim == 2]


def write(folder, stored, prefix="", beside=None, shards=1, metadata=None):
    """The files, and what to load."""
    tensors = {prefix + name: t for name, t in stored.items()} | (beside or {})
    names = sorted(tensors)
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        common.save(folder, part, None, metadata, f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors")
    if shards > 1:
        placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
    return folder if shards > 1 else folder / "model.safetensors"


def load(path, **options):
    return model.load(model.Request(str(path), **{"dtype": "fp32", **options}), quiet=True)


def expected(truth):
    """Stock ComfyUI on the weights that a file means."""
    import comfy.model_detection
    import comfy.sd

    if "x_embedder.weight" in truth:
        truth = comfy.model_detection.convert_diffusers_mmdit(dict(truth))
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(truth), model_options={"dtype": torch.float32})
    return flux.comfy_velocity(patcher, **flux.inputs())


LORA = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "double_blocks.1.txt_mlp.2")


def run_flux(patcher, load=True):
    return flux.comfy_velocity(patcher, load=load, **flux.inputs())


def lora_agrees(loaded, truth, folder, layers=LORA, run=run_flux, meant=expected):
    """A LoRA on a loaded model whose weights are `truth` (native names): in low VRAM exactly W + B A; fully loaded, coded
    again, the same effect; and gone when it is taken away. `run`(patcher, load) and `meant`(truth) are one forward of
    the model and of stock ComfyUI."""
    g, lora, truth = torch.Generator().manual_seed(5), {}, dict(truth)
    for layer in layers:
        rows, columns = truth[f"{layer}.weight"].shape
        a, b = torch.randn(8, columns, generator=g) * columns ** -0.5, torch.randn(rows, 8, generator=g) * 8 ** -0.5
        lora |= {f"diffusion_model.{layer}.lora_A.weight": a, f"diffusion_model.{layer}.lora_B.weight": b}
        truth[f"{layer}.weight"] = truth[f"{layer}.weight"] + b @ a
    folder.mkdir()
    patched = lora_tools.load_lora(loaded.patcher, lora, folder)
    assert len(patched.patches) == len(layers)
    before, wanted = run(loaded.patcher), meant(truth)
    low = lora_tools.low_vram(patched, lambda p: run(p, False))
    assert common.rel_l2(low, wanted) < EXACT
    effect, full = wanted - before, run(patched) - before
    assert torch.nn.functional.cosine_similarity(full.flatten(), effect.flatten(), 0) > 0.9
    assert abs(float(full.norm() / effect.norm()) - 1) < 0.1
    assert torch.equal(run(loaded.patcher), before)

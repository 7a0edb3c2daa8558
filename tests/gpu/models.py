"""Whole models of published sizes with random weights in any format: made in memory, run as loaded ones are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from support import qwen_image

from . import layers
from .layers import Arm
from .machine import Where, let_go
from .rows import Rows

# config.json of the published transformers, as far as it differs from diffusers' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "FLUX.1": {"guidance_embeds": True},
    "Wan": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16,
            "out_channels": 16},
    "Qwen-Image": {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64,
                   "out_channels": 16, "joint_attention_dim": 3584},
}
TINY = {"FLUX.1": {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64,
                   "pooled_projection_dim": 32},
        "Wan": {"num_attention_heads": 2, "ffn_dim": 256, "num_layers": 1},
        "Qwen-Image": {"num_attention_heads": 2, "num_layers": 1, "joint_attention_dim": 64}}
# What a whole step is measured in. "auto": the kernel that a load chooses; "host": nothing of this pack.
ARMS = {
    "bf16": layers.BF16,
    "fp8, ComfyUI alone": Arm("fp8", "host", "host"),
    "fp8": Arm("fp8", "host", "auto"),
    "fp8, q k v with scales of their own": Arm("fp8", "shards", "auto"),
    "nvfp4, ComfyUI alone": Arm("nvfp4", "host", "host"),
    "nvfp4": Arm("nvfp4", "host", "auto"),
    "mxfp8": Arm("w8a8_mxfp8", "host", "auto"),
    "int8": Arm("w8a8_dynamic", "host", "auto"),
    "svdq int4, comfy-kitchen": Arm("svdq_int4", "tiles", "comfy_kitchen"),
    "svdq int4, dequantized": Arm("svdq_int4", "tiles", ""),
}


def build(name: str, arm: Arm, where: Where, **config: Any) -> Any:
    """ComfyUI's MODEL of an architecture of this name, its blocks' Linears in this arm's format (modulations beside
    SVDQuant in AWQ, as Nunchaku has them), everything else BF16. On the CPU, where layers of one shape share memory."""
    from quantized_transformers import host
    from quantized_transformers.loaders.architectures import ARCHITECTURES, Naming
    from quantized_transformers.loaders.model import attach_lora
    from quantized_transformers.quant.codecs import codec

    architecture = next(one for one in ARCHITECTURES if one.name == name)
    dims = architecture.dims_from_config({**CONFIGS[name], **(TINY[name] if where.tiny else {}), **config})
    tensors: dict[str, torch.Tensor] = {}
    made: dict[Any, Mapping[str, torch.Tensor]] = {}
    codecs = set()
    for module in architecture.modules(dims, Naming("diffusers")):
        leaf = module.native if module.leaf == "" else f"{module.native}.{module.leaf}".strip(".")
        own = arm if module.linear and "blocks." in module.native else layers.BF16
        if own.codec.startswith("svdq") and "mod" in module.native:
            own = Arm("awq", "tiles", own.kernel)
        if own.layout == "shards" and len(module.rows) == 1:
            own = own._replace(layout="host")
        if module.linear:
            key = (own, module.rows, module.inner)
            if key not in made:
                made[key] = layers.leaves(own, module.rows, *module.inner, rank=where.size.rank)
            tensors |= {f"{module.native}.{leaf}": tensor for leaf, tensor in made[key].items()}
            codecs |= {own.codec} if own.codec != "plain" else set()
        else:
            shape = (sum(module.rows), *module.inner)
            tensors[leaf] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else \
                (torch.randn(shape) / torch.tensor(shape[1:]).prod().sqrt()).to(torch.bfloat16)
        if module.bias:
            tensors[f"{module.native}.bias"] = torch.zeros(sum(module.rows), dtype=torch.bfloat16)
    for mark in architecture.marks(dims):
        tensors[mark] = torch.zeros(0)
    options = {} if arm.kernel == "host" else {"custom_operations": _operations(arm, codecs, tensors)}
    with qwen_image.small_widths() if where.tiny else nullcontext():
        patcher = host.load_state_dict(tensors, options=options)
    if patcher is None:
        raise ValueError(f"ComfyUI does not know this {name}")
    if any(not codec(one).requantizes for one in codecs):
        attach_lora(patcher)
    return patcher


def _operations(arm: Arm, codecs: set[str], tensors: dict[str, torch.Tensor]) -> Any:
    from quantized_transformers import host
    from quantized_transformers.quant.kernels.choose import Wanted, choose, here
    from quantized_transformers.quant.linear import with_tiles_of

    backend = "" if arm.kernel == "auto" else arm.kernel or "dequantize"
    choice = choose(Wanted(backend=backend), codecs, here(codecs))
    return with_tiles_of(host.mixed_operations(tensors), choice.kernels)


def step(patcher: Any, where: Where, pixels: int = 0, frames: int = 1) -> dict[str, Any]:
    """Times and memory of sampling steps, as the nodes sample."""
    from statistics import median

    from quantized_transformers.makers.bench.measure import measure, random_conditioning, random_latent

    pixels = 64 if where.tiny else pixels or where.size.pixels
    found = measure(patcher, random_latent(patcher, pixels, pixels, 1 if where.tiny else frames),
                    random_conditioning(patcher), warm=1 if where.tiny else 2, steps=where.size.steps)
    return {"step": median(found.steps), "steps": list(found.steps), "launch": median(found.launch), "held": found.held,
            "peak": found.peak}


def measured(rows: Rows, key: str, name: str, arm: Arm, where: Where, work: Callable[[Any], dict[str, Any]],
             **config: Any) -> None:
    """A row of what `work` finds of a model in this format, unless stage 2 found the format wrong."""
    def run() -> dict[str, Any]:
        from quantized_transformers.quant.kernels.choose import Wanted, choose, here

        kernel = arm.kernel
        if kernel == "auto":
            kernel = choose(Wanted(), {arm.codec}, here({arm.codec})).kernels.get(arm.codec, "")
        for like in {arm, arm._replace(kernel=kernel), arm._replace(layout="host", kernel="host")}:
            problem = rows.failed(like.key) if like.layout != "host" or like.kernel == "host" else ""
            if problem:
                raise ValueError(f"not timed: {like.key}: {problem}")
        try:
            return {"arm": arm.key, "kernel": kernel, **work(build(name, arm, where, **config))}
        finally:
            let_go()

    rows.measure(key, run)

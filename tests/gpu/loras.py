"""Stage 6: a LoRA of rank 32 on all of FLUX.1's block layers: what patching takes, and a step with it."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from .machine import Where
from .models import ARMS, measured, step
from .rows import Rows

LIMIT = 300


def run(rows: Rows, where: Where) -> None:
    for name in ("bf16", "fp8", "nvfp4", "svdq int4, comfy-kitchen"):
        measured(rows, name, "FLUX.1", ARMS[name], where, lambda patcher: _with_lora(patcher, where))


def _with_lora(patcher: Any, where: Where) -> dict[str, Any]:
    import comfy.model_management
    import comfy.sd

    lora = _lora(patcher, where.size.rank)
    comfy.model_management.load_models_gpu([patcher])
    where.wait()
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    start = perf_counter()
    comfy.model_management.load_models_gpu([patched])
    where.wait()
    seconds = perf_counter() - start
    return {"layers": len(lora) // 2, "patched": len(patched.patches), "patch": seconds, **step(patched, where)}


def _lora(patcher: Any, rank: int) -> dict[str, torch.Tensor]:
    """Under ComfyUI's own names; layers of one shape share the factors."""
    found: dict[str, torch.Tensor] = {}
    made: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if "blocks." in name and isinstance(module, torch.nn.Linear) or hasattr(module, "quant_format"):
            shape = (module.out_features, module.in_features)
            if shape not in made:
                made[shape] = ((torch.randn(shape[0], rank) * 0.01).to(torch.bfloat16),
                               (torch.randn(rank, shape[1]) * 0.01).to(torch.bfloat16))
            found[f"diffusion_model.{name}.lora_up.weight"], found[f"diffusion_model.{name}.lora_down.weight"] = made[shape]
    return found

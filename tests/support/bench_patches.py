"""What a LoRA on quantized weights costs, beside stock ComfyUI: to apply, each step, and in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent
from support.synthetic import flux_twins

RANK = 32
LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0")
TITLE = f"a LoRA of rank {RANK} on {len(LAYERS)} FP8 layers of FLUX.1's shapes, fully loaded"


def cases(folder: Path) -> list[tuple[Path, Path]]:
    return [flux_twins(folder, double=1, single=1)]


def measure(folder: str, file: str) -> list[Row]:
    import comfy.model_management
    import comfy.sd
    import torch

    from quantized_transformers.loaders import model

    def fully(patcher: Any) -> None:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)

    def lora_for(net: Any) -> dict[str, Any]:
        g, lora = torch.Generator().manual_seed(0), {}
        for name in LAYERS:
            module = net.get_submodule(name)
            if not getattr(module.weight, "_layout_cls", ""):
                raise RuntimeError(f"{name} is not quantized")
            lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(module.out_features, RANK, generator=g) / 100
            lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(RANK, module.in_features, generator=g) / 100
        return {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}

    plain = {"ours": model.load(model.Request(folder), quiet=True).patcher, "stock": comfy.sd.load_diffusion_model(file)}
    loras = {who: lora_for(patcher.model.diffusion_model) for who, patcher in plain.items()}
    patched = {who: comfy.sd.load_lora_for_models(patcher, None, loras[who], 1.0, 0.0)[0] for who, patcher in plain.items()}
    def without(name: str) -> None:
        for patcher in plain.values():
            fully(patcher)

    def applying(who: str) -> Callable[[], None]:
        return lambda: fully(patched[who])

    def deltas() -> None:
        factors = [tensor.float() for tensor in loras["ours"].values()]
        for up, down in zip(factors[::2], factors[1::2], strict=True):
            up @ down

    took = spent({**{who: applying(who) for who in patched}, "deltas": deltas}, 2, without)
    rows = [Row("applying, over the products of its factors", took["ours"] / took["deltas"], 3,
                {"stock": took["stock"] / took["deltas"]})]

    net = plain["ours"].model.diffusion_model
    module = net.get_submodule(LAYERS[0])
    fully(patched["ours"])
    held = module.held
    x = torch.randn(1024, module.in_features).to(module.weight.dtype)  # tokens of 512 x 512

    def step(factors: Any) -> Callable[[], None]:
        def forward() -> None:
            module.held = factors
            module(x)
        return forward

    with torch.inference_mode():
        took = spent({"with": step(held), "without": step(None)}, 5)
    module.held = held
    elements = sum(one.elements for m in net.modules() if getattr(m, "held", None) for one in m.held.factors)
    return [*rows, Row("a layer with it, over the layer without", took["with"] / took["without"], 1.1),
            Row("memory beside the weights, over the LoRA's", elements / sum(t.numel() for t in loras["ours"].values()), 1)]

"""LoRAs for tests: made, loaded by the host's own node, merged by definition, and run in low-VRAM mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support import common


def low_vram(patcher: Any, run: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """`run(patcher)` with no weight loaded: each is fetched and patched when its layer runs, as with too little VRAM."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    try:
        return run(patcher)
    finally:
        patcher.unpatch_model(patcher.offload_device)


def load_lora(patcher: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    """The host's own LoraLoaderModelOnly at strength 1, on a file in a loras folder."""
    from safetensors.torch import save_file

    from nodes import LoraLoaderModelOnly
    from support.common import model_folder

    save_file(tensors, str(folder / f"{folder.name}.safetensors"))
    with model_folder("loras", folder):
        return LoraLoaderModelOnly().load_lora_model_only(patcher, f"{folder.name}.safetensors", 1.0)[0]


def random_lora(targets: dict[str, tuple[int, int]], prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """A rank-8 LoRA in diffusers' (PEFT) names: layer -> (rows, columns)."""
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (rows, columns) in targets.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(8, columns, generator=g) * columns ** -0.5
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, 8, generator=g) * 8 ** -0.5
    return tensors


def of_every_linear(net: Any, prefix: str, rank: int = 4) -> tuple[dict[str, torch.Tensor], Callable[[float], None]]:
    """(a LoRA in diffusers' names on every Linear of a model, what merges it by its definition, W + scale * B A)."""
    linears = {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    g, tensors = torch.Generator().manual_seed(12), {}
    for name, module in linears.items():
        rows, columns = module.weight.shape
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=g) * columns ** -0.5
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * (0.3 * rank ** -0.5)

    def merge_it(scale: float) -> None:
        with torch.no_grad():
            for name, module in linears.items():
                module.weight += scale * (tensors[f"{prefix}{name}.lora_B.weight"] @ tensors[f"{prefix}{name}.lora_A.weight"])

    return tensors, merge_it


def by_our_node(patcher: Any, tensors: dict[str, torch.Tensor], folder: Path, metadata: dict[str, str] | None = None,
                strength: float = 1.0) -> tuple[Any, str]:
    """(MODEL, report) of the pack's node, on a file."""
    from safetensors.torch import save_file

    from quantized_transformers.nodes.load_lora import QT_LoadLoRA

    save_file(tensors, str(folder / "every.safetensors"), metadata)
    return tuple(QT_LoadLoRA.execute(patcher, "", strength, path=str(folder / "every.safetensors")).args)


def follows(base: Any, reference: Any, folder: Path) -> None:
    """A LoRA on a loaded FLUX.1 of conftest's sizes does what diffusers does with W + B A; `reference` is the model that its
    weights mean, and is changed. Taken off, nothing is left."""
    from support import flux

    before = flux.comfy_velocity(base.patcher, **flux.inputs())
    lora = random_lora({"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.ff.net.2": (256, 1024),
                        "single_transformer_blocks.0.proj_mlp": (1024, 256)})
    patched = load_lora(base.patcher, lora, folder)
    with torch.no_grad():
        for name in [key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")]:
            weight = reference.get_submodule(name.removeprefix("transformer.")).weight
            weight += lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    expected = flux.diffusers_velocity(reference, **flux.inputs())
    assert common.rel_l2(expected, before) > 1e-3
    assert common.rel_l2(flux.comfy_velocity(patched, **flux.inputs()), expected) < 1e-5
    assert torch.equal(flux.comfy_velocity(base.patcher, **flux.inputs()), before)


def merge(tensors: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], prefix: str = "transformer.") -> dict:
    """Dequantized weights with the LoRA merged by its definition, W + B A."""
    merged = common.dequantize(tensors)
    for name in [n.removesuffix(".lora_A.weight") for n in lora if n.endswith(".lora_A.weight")]:
        weight = f"{name.removeprefix(prefix)}.weight"
        merged[weight] = merged[weight] + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    return merged

"""Tiny Qwen-Image and Qwen-Image-Edit models: made by diffusers, exported by nvidia-modelopt, run by both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support import common

# What ComfyUI fixes cannot shrink (specs/parity.md section 1): heads of 128, 16 latent channels, MLP ratio 4.
HEAD, TEXT, REAL_HIDDEN = 128, 64, 3072


@contextmanager
def small_widths() -> Iterator[None]:
    """Let the host build narrow models: it has 24 heads and 3584 text channels in its code, instead of detecting them.

    A model of the real width is left to the host.
    """
    import comfy.model_detection

    detect = comfy.model_detection.detect_unet_config

    def detect_widths(tensors: dict, prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        config = detect(tensors, prefix, *args, **kwargs)
        if config and config.get("image_model") == "qwen_image" \
                and tensors[f"{prefix}img_in.weight"].shape[0] != REAL_HIDDEN:
            config["num_attention_heads"] = tensors[f"{prefix}img_in.weight"].shape[0] // HEAD
            config["joint_attention_dim"] = tensors[f"{prefix}txt_norm.weight"].shape[0]
        return config

    comfy.model_detection.detect_unet_config = detect_widths
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect


def make(heads: int = 2, layers: int = 2, zero_cond_t: bool = False, seed: int = 0) -> Any:
    """A seeded diffusers QwenImageTransformer2DModel in BF16, every norm and bias randomised too."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return common.randomise(QwenImageTransformer2DModel(
        num_layers=layers, attention_head_dim=HEAD, num_attention_heads=heads, joint_attention_dim=TEXT,
        zero_cond_t=zero_cond_t))


def inputs(batch: int = 2, height: int = 8, width: int = 12, text: int = 7, references: int = 0,
           seed: int = 1) -> dict[str, Any]:
    """Latents [B, 16, 1, H, W], sigma .5 and .25, text [B, T, 64] and reference latents; F32.

    Token counts are even (odd ones are centred differently, specs/parity.md section 3) and references no larger than
    the latents (diffusers' text positions start behind the largest of all, the host's behind the latents).
    """
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 16, 1, height, width, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "text": torch.randn(batch, text, TEXT, generator=g),
            "references": [torch.randn(batch, 16, 1, height, 8 - 4 * i, generator=g) for i in range(references)]}


def _pack(x: torch.Tensor) -> torch.Tensor:
    """2x2 patches as tokens, as QwenImagePipeline packs them."""
    b, c, _, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                       references: list[torch.Tensor]) -> torch.Tensor:
    """diffusers' own forward in the model's dtype; references follow the latents, as QwenImageEditPlusPipeline does."""
    images = [x, *references]
    tokens = torch.cat([_pack(image) for image in images], dim=1)
    b, c, _, h, w = x.shape
    with torch.no_grad():
        out = model(hidden_states=tokens.to(model.dtype), timestep=sigma, encoder_hidden_states=text.to(model.dtype),
                    img_shapes=[[(1, i.shape[-2] // 2, i.shape[-1] // 2) for i in images]] * b, return_dict=False)[0]
    out = out[:, :h * w // 4]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, 1, h, w)


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                   references: list[torch.Tensor], load: bool = True) -> torch.Tensor:
    """The same through the host."""
    conds = {"ref_latents": references} if references else {}
    return common.apply_model(patcher, x, sigma, load, c_crossattn=text, **conds)


def export(model: Any, folder: Path, algorithm: str = "FP8", **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model, calibrated with a reference latent."""
    return common.export(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(references=1, seed=seed)),
                         algorithm, **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False) -> Any:
    """diffusers' Qwen-Image on the stored weights, FP8 activations emulated (common.emulate)."""
    from diffusers import QwenImageTransformer2DModel

    return common.emulate(QwenImageTransformer2DModel, tensors, config, dynamic)


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
    import folder_paths
    from safetensors.torch import save_file

    from nodes import LoraLoaderModelOnly

    save_file(tensors, str(folder / f"{folder.name}.safetensors"))
    folder_paths.add_model_folder_path("loras", str(folder))
    return LoraLoaderModelOnly().load_lora_model_only(patcher, f"{folder.name}.safetensors", 1.0)[0]


def random_lora(targets: dict[str, tuple[int, int]], prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """A rank-8 LoRA in diffusers' (PEFT) names: layer → (rows, columns)."""
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (rows, columns) in targets.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(8, columns, generator=g) * columns ** -0.5
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, 8, generator=g) * 8 ** -0.5
    return tensors


def merge(tensors: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], prefix: str = "transformer.") -> dict:
    """Dequantized weights with the LoRA merged by its definition, W + B A."""
    merged = common.dequantize(tensors)
    for name in [n.removesuffix(".lora_A.weight") for n in lora if n.endswith(".lora_A.weight")]:
        weight = f"{name.removeprefix(prefix)}.weight"
        merged[weight] = merged[weight] + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    return merged

"""Tiny Qwen-Image and Qwen-Image-Edit models: made by diffusers, exported by nvidia-modelopt, run by both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support import common

# What ComfyUI fixes cannot shrink: heads of 128, 16 latent channels, MLP ratio 4.
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


def make(heads: int = 2, layers: int = 2, zero_cond_t: bool = False, seed: int = 0, layered: bool = False) -> Any:
    """A seeded diffusers QwenImageTransformer2DModel in BF16, every norm and bias randomised too."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return common.randomise(QwenImageTransformer2DModel(
        num_layers=layers, attention_head_dim=HEAD, num_attention_heads=heads, joint_attention_dim=TEXT,
        zero_cond_t=zero_cond_t, use_additional_t_cond=layered, use_layer3d_rope=layered))


def inputs(batch: int = 2, height: int = 8, width: int = 12, text: int = 7, references: int = 0,
           seed: int = 1, frames: int = 1) -> dict[str, Any]:
    """Latents [B, 16, frames, H, W], sigma .5 and .25, text [B, T, 64] and reference latents; F32.

    Token counts are even (odd ones are centred differently: .008 to .014) and references no larger than
    the latents (diffusers' text positions start behind the largest of all, the host's behind the latents).
    """
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 16, frames, height, width, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "text": torch.randn(batch, text, TEXT, generator=g),
            "references": [torch.randn(batch, 16, 1, height, 8 - 4 * i, generator=g) for i in range(references)]}


def _pack(x: torch.Tensor) -> torch.Tensor:
    """2x2 patches as tokens, as QwenImagePipeline and, of several frames, QwenImageLayeredPipeline pack them."""
    b, c, f, h, w = x.shape
    return x.view(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, f * h * w // 4, c * 4)


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                       references: list[torch.Tensor]) -> torch.Tensor:
    """diffusers' own forward in the model's dtype; references follow the latents, as QwenImageEditPlusPipeline does."""
    images = [x, *references]
    tokens = torch.cat([_pack(image) for image in images], dim=1)
    b, c, f, h, w = x.shape
    shapes = [(1, i.shape[-2] // 2, i.shape[-1] // 2) for i in images for _ in range(i.shape[2])]
    more = {"additional_t_cond": torch.zeros(b, dtype=torch.long)} if model.config.use_additional_t_cond else {}
    with torch.no_grad():
        out = model(hidden_states=tokens.to(model.dtype), timestep=sigma, encoder_hidden_states=text.to(model.dtype),
                    img_shapes=[shapes] * b, return_dict=False, **more)[0]
    out = out[:, :f * h * w // 4]
    return out.view(b, f, h // 2, w // 2, c, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


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

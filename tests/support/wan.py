"""Tiny Wan models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from support.common import apply_model, diffusers_class, randomise
from support.common import emulate as emulate_class
from support.common import export as export_model

# What ComfyUI fixes cannot shrink: heads of 128, text of 4096, CLIP features of 1280.
HEAD, TEXT, IMAGE, FFN = 128, 4096, 1280, 256
IMAGE_TOKENS = 5  # the real CLIP gives 257
# Every model the class covers: what `make` and what `inputs` is told for it.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "T2V": ({}, {}),
    "Wan2.2 I2V": ({"channels": 36}, {"concat": 20}),
    "Lucy-Edit": ({"channels": 96, "out": 48}, {"channels": 48, "concat": 48}),
    "TI2V-5B": ({"channels": 48, "out": 48}, {"channels": 48}),
    "Wan2.1 I2V": ({"channels": 36, "image": True}, {"concat": 20, "image": IMAGE_TOKENS}),
    "Wan2.1 FLF2V": ({"channels": 36, "image": True, "positions": 2 * IMAGE_TOKENS},
                     {"concat": 20, "image": 2 * IMAGE_TOKENS}),
    "Fun Control": ({"channels": 48, "image": True}, {"concat": 32, "image": IMAGE_TOKENS}),
}


def make(heads: int = 2, layers: int = 2, channels: int = 16, out: int = 16, image: bool = False,
         positions: int | None = None, seed: int = 0, kind: str = "WanTransformer3DModel") -> Any:
    """A seeded diffusers WanTransformer3DModel, or relative, in BF16, every norm, bias and modulation randomised too."""
    torch.manual_seed(seed)
    model = diffusers_class(kind)(
        num_attention_heads=heads, attention_head_dim=HEAD, in_channels=channels, out_channels=out, text_dim=TEXT,
        ffn_dim=FFN, num_layers=layers, image_dim=IMAGE if image else None,
        added_kv_proj_dim=heads * HEAD if image else None, pos_embed_seq_len=positions)
    rope = copy.deepcopy(model.rope)
    randomise(model).rope = rope  # its tables are F32 in every run of diffusers (_keep_in_fp32_modules): 6e-5 otherwise
    return model


def inputs(batch: int = 2, frames: int = 3, height: int = 6, width: int = 10, text: int = 7, channels: int = 16,
           concat: int = 0, image: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents [B, C, T, H, W], sigma .5 and .25, text [B, L, 4096]; F32.

    `concat`: channels of the latents that I2V puts behind the noisy ones. `image`: tokens of CLIP features, first and
    last frame's behind each other; diffusers counts these as what is more than 512 tokens, so text has 512 then.
    """
    g = torch.Generator().manual_seed(seed)
    made = {"x": torch.randn(batch, channels, frames, height, width, generator=g),
            "sigma": torch.tensor([0.5, 0.25])[:batch],
            "text": torch.randn(batch, 512 if image else text, TEXT, generator=g)}
    if concat:
        made["concat"] = torch.randn(batch, concat, frames, height, width, generator=g)
    if image:
        made["image"] = torch.randn(batch, image, IMAGE, generator=g)
    return made


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                       concat: torch.Tensor | None = None, image: torch.Tensor | None = None,
                       frame_mask: torch.Tensor | None = None) -> torch.Tensor:
    """diffusers' own forward in the model's dtype, called as WanPipeline and WanImageToVideoPipeline call it.

    `frame_mask` [T]: a factor for each frame's timestep (TI2V from an image: 0 for the frames that are given).
    """
    latents = x if concat is None else torch.cat([x, concat], 1)
    timestep = sigma * 1000
    if frame_mask is not None:  # one for each token
        timestep = (timestep[:, None] * frame_mask).repeat_interleave(x.shape[-1] * x.shape[-2] // 4, 1)
    if image is not None:
        if model.config.pos_embed_seq_len:  # the pipeline passes first and last frame as two of the batch
            image = image.reshape(-1, image.shape[1] // 2, IMAGE)
        image = image.to(model.dtype)
    with torch.no_grad():
        return model(hidden_states=latents.to(model.dtype), timestep=timestep,
                     encoder_hidden_states=text.to(model.dtype), encoder_hidden_states_image=image,
                     return_dict=False)[0]


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                   concat: torch.Tensor | None = None, image: torch.Tensor | None = None,
                   frame_mask: torch.Tensor | None = None, load: bool = True) -> torch.Tensor:
    """The same through the host."""
    conds = {"c_concat": concat, "clip_fea": image}
    if frame_mask is not None:
        conds["denoise_mask"] = frame_mask.view(1, 1, -1, 1, 1).expand(x.shape)
    return apply_model(patcher, x, sigma, load, c_crossattn=text, **{k: v for k, v in conds.items() if v is not None})


def export(model: Any, folder: Path, algorithm: str = "FP8", keep: list[str] | None = None, variant: str = "T2V",
           **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model ("FP8" or "NVFP4"); `variant` is the one its inputs must fit."""
    fitting = VARIANTS[variant][1]
    return export_model(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(**fitting, seed=seed)), algorithm,
                        keep, **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, **kwargs: Any) -> Any:
    """diffusers' Wan on the stored weights, quantized activations emulated (common.emulate)."""
    from diffusers import WanTransformer3DModel

    return emulate_class(WanTransformer3DModel, tensors, config, **kwargs)

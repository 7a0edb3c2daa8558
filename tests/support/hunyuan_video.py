"""Tiny HunyuanVideo models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.common import apply_model, of_width, randomise
from support.common import emulate as emulate_class
from support.common import export as export_model

# What ComfyUI fixes cannot shrink: heads of 128, pooled text 768, two refiner blocks.
HEAD, TEXT, POOLED, CHANNELS = 128, 64, 768, 16
FALLBACK = [r"transformer_blocks\.\d+\.norm1(_context)?\.linear", r"transformer_blocks\.\d+\.ff(_context)?\.net\..*",
            r"single_transformer_blocks\.\d+\.norm\.linear", r"context_embedder.*|time_text_embed.*|proj_out|norm_out.*"]


def make(heads: int = 2, double: int = 1, single: int = 2, guidance: bool = True, channels: int = CHANNELS,
         seed: int = 0) -> Any:
    """A seeded diffusers HunyuanVideoTransformer3DModel in BF16, every norm and bias randomised too."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(seed)
    return randomise(HunyuanVideoTransformer3DModel(
        in_channels=channels, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
        num_attention_heads=heads, text_embed_dim=TEXT, guidance_embeds=guidance))


def inputs(batch: int = 2, channels: int = CHANNELS, frames: int = 2, height: int = 4, width: int = 6, text: int = 7,
           seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents [B, 16, T, H, W], sigma .5 and .25, guidance 4, text [B, L, 64], pooled [B, 768]; F32."""
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, channels, frames, height, width, generator=g),
            "sigma": torch.tensor([0.5, 0.25])[:batch], "guidance": torch.full((batch,), 4.0),
            "text": torch.randn(batch, text, TEXT, generator=g), "pooled": torch.randn(batch, POOLED, generator=g)}


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor,
                       pooled: torch.Tensor) -> torch.Tensor:
    """diffusers' own forward in the model's dtype, every text token valid; time and guidance as its pipeline scales."""
    with torch.no_grad():
        return model(hidden_states=x.to(model.dtype), timestep=sigma * 1000, encoder_hidden_states=text.to(model.dtype),
                     encoder_attention_mask=torch.ones(text.shape[:2], dtype=torch.long),
                     pooled_projections=pooled.to(model.dtype), return_dict=False,
                     guidance=guidance * 1000 if model.config.guidance_embeds else None)[0]


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor,
                   pooled: torch.Tensor, load: bool = True) -> torch.Tensor:
    """The same through the host."""
    return apply_model(patcher, x, sigma, load, c_crossattn=text, y=pooled, guidance=guidance)


def export(model: Any, folder: Path, algorithm: str = "FP8", keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model; `algorithm` is "FP8" or "NVFP4".

    The forward is given by hand: modelopt has no dummy inputs for this class, and skips what it would use them for.
    """
    return export_model(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(seed=seed)), algorithm, keep,
                        **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False) -> Any:
    """diffusers' HunyuanVideo on the stored weights, FP8 activations emulated (common.emulate)."""
    from diffusers import HunyuanVideoTransformer3DModel

    return emulate_class(HunyuanVideoTransformer3DModel, tensors, config, dynamic)


def convert(state_dict: dict[str, torch.Tensor], hidden: int = 3072) -> dict[str, torch.Tensor]:
    """diffusers' own converter: the vendor's names -> diffusers' names, of this width."""
    from diffusers.loaders import single_file_utils

    return of_width(single_file_utils.convert_hunyuan_video_transformer_to_diffusers, hidden)(dict(state_dict))


def vendor_names(double: int = 1, single: int = 2, guidance: bool = True) -> list[str]:
    """The tensor names of the first release (hyvideo/modules/models.py and token_refiner.py), written out."""
    layers = ["img_in.proj", "time_in.mlp.0", "time_in.mlp.2", "vector_in.in_layer", "vector_in.out_layer",
              "txt_in.input_embedder", "txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2",
              "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", "final_layer.linear",
              "final_layer.adaLN_modulation.1"]
    layers += ["guidance_in.mlp.0", "guidance_in.mlp.2"] if guidance else []
    norms = []
    for i in range(2):
        layers += [f"txt_in.individual_token_refiner.blocks.{i}.{layer}" for layer in (
            "norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    for i in range(double):
        for s in ("img", "txt"):
            layers += [f"double_blocks.{i}.{s}_{layer}" for layer in (
                "mod.linear", "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")]
            norms += [f"double_blocks.{i}.{s}_attn_q_norm", f"double_blocks.{i}.{s}_attn_k_norm"]
    for i in range(single):
        layers += [f"single_blocks.{i}.{layer}" for layer in ("linear1", "linear2", "modulation.linear")]
        norms += [f"single_blocks.{i}.q_norm", f"single_blocks.{i}.k_norm"]
    return [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")] + [f"{norm}.weight" for norm in norms]


def by_host(state_dict: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's own renaming of the vendor's names."""
    from comfy.supported_models import HunyuanVideo

    return HunyuanVideo.process_unet_state_dict(None, state_dict)


def vendor_by_host() -> dict[str, str]:
    """Native name -> the vendor's."""
    return by_host({name: name for name in vendor_names()})

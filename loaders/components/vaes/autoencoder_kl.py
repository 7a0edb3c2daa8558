"""diffusers AutoencoderKL: with 16 latent channels that of FLUX.1 and of what has FLUX.1's (Z-Image, Chroma, Lumina 2,
HiDream, LongCat-Image, Ovis-Image, Kandinsky 5 Image), or Stable Diffusion 3's; with 4 that of SDXL (AuraFlow,
PixArt Sigma, Hunyuan-DiT) or of Stable Diffusion 1 and 2 (PixArt Alpha). config.json tells them apart by how latents
are scaled. ComfyUI reads its names by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .... import host
from ....host.texts import Text
from .base import CHANNELS, GROUPS, Plan, VAEClass, kl_sizes, levels, scaled, whole

DEFAULT_SCALE = 0.18215  # diffusers' class; Stable Diffusion 1 and 2
# latent channels -> family, the host's latent format
LATENTS = {16: ("FLUX.1, Z-Image", "Flux"), 4: ("SDXL", "SDXL")}
# latent channels, scale -> the same
OF_SCALE = {(4, DEFAULT_SCALE): ("Stable Diffusion 1, 2", "SD15"), (16, 1.5305): ("Stable Diffusion 3", "SD3")}

# What the 2D networks of ComfyUI have fixed (comfy/ldm/modules/diffusionmodules/model.py), under diffusers' names.
FIXED_2D = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": GROUPS,
    "mid_block_add_attention": True, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def _plan(config: Mapping[str, Any]) -> Plan:
    widths, latent = levels(config, "block_out_channels", CHANNELS), whole(config, "latent_channels", 4)
    if latent not in LATENTS:
        raise ValueError(Text("config.json: latent_channels is {value}; ComfyUI's models have 4 or 16", value=latent))
    scale = config.get("scaling_factor")
    family, latent_format = OF_SCALE.get((latent, DEFAULT_SCALE if scale is None else scale), LATENTS[latent])
    before, after = (config.get(key) is not False for key in ("use_quant_conv", "use_post_quant_conv"))
    if before != after:
        raise ValueError(Text("config.json: use_quant_conv and use_post_quant_conv differ; ComfyUI has both or none"))
    return Plan(family, "kl", kl_sizes(latent, widths, widths, after), kl_sizes(latent, CHANNELS, CHANNELS, after),
                widths == CHANNELS, latent_format, latent, scaled(config, DEFAULT_SCALE), host.diffusers_vae_names,
                Text("widths {widths}", widths=widths))


AUTOENCODER_KL = VAEClass(
    "AutoencoderKL", {**FIXED_2D, "latents_mean": "none", "latents_std": "none"},
    frozenset({"block_out_channels", "latent_channels", "use_quant_conv", "use_post_quant_conv", "scaling_factor",
               "shift_factor"}),
    frozenset({"sample_size", "force_upcast"}), _plan)

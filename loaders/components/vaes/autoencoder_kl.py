"""diffusers AutoencoderKL with 16 latent channels: FLUX.1 and Z-Image. ComfyUI reads its names by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .... import host
from .base import CHANNELS, GROUPS, Plan, VAEClass, kl_sizes, levels, scaled

LATENT = 16

# What the 2D networks of ComfyUI have fixed (comfy/ldm/modules/diffusionmodules/model.py), under diffusers' names.
FIXED_2D = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": GROUPS,
    "mid_block_add_attention": True, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def _plan(config: Mapping[str, Any]) -> Plan:
    widths = levels(config, "block_out_channels", CHANNELS)
    before, after = (config.get(key) is not False for key in ("use_quant_conv", "use_post_quant_conv"))
    if before != after:
        raise ValueError("config.json: use_quant_conv and use_post_quant_conv differ; ComfyUI has both or none")
    return Plan("FLUX.1, Z-Image", "kl", kl_sizes(LATENT, widths, widths, after),
                kl_sizes(LATENT, CHANNELS, CHANNELS, after), widths == CHANNELS, "Flux", LATENT,
                scaled(config, 0.18215), host.diffusers_vae_names, f"widths {widths}")


AUTOENCODER_KL = VAEClass(
    "AutoencoderKL", {**FIXED_2D, "latent_channels": LATENT, "latents_mean": "none", "latents_std": "none"},
    frozenset({"block_out_channels", "use_quant_conv", "use_post_quant_conv", "scaling_factor", "shift_factor"}),
    frozenset({"sample_size", "force_upcast"}), _plan)

"""diffusers AutoencoderKLHunyuanVideo (1.0). ComfyUI reads its names by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import host
from .base import CHANNELS, GROUPS, Plan, VAEClass, kl_sizes, levels, scaled

LATENT, TEMPORAL = 16, 4


def _plan(config: Mapping[str, Any]) -> Plan:
    widths = levels(config, "block_out_channels", CHANNELS)
    video: dict[str, Any] = {"conv3d": True, "time_compress": TEMPORAL}
    return Plan("HunyuanVideo", "kl", kl_sizes(LATENT, widths, widths, **video),
                kl_sizes(LATENT, CHANNELS, CHANNELS, **video), widths == CHANNELS, "HunyuanVideo", LATENT,
                scaled(config, 0.476986), host.diffusers_vae_names, f"widths {widths}",
                ("ComfyUI works through videos in pieces, with group norms per piece and attention over all frames, "
                 "diffusers over the whole video with causal attention: single frames are equal, videos differ",))


HUNYUAN_VIDEO = VAEClass(
    "AutoencoderKLHunyuanVideo",
    {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "layers_per_block": 2, "act_fn": "silu",
     "norm_num_groups": GROUPS, "mid_block_add_attention": True, "spatial_compression_ratio": 8,
     "temporal_compression_ratio": TEMPORAL, "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
     "up_block_types": ["HunyuanVideoUpBlock3D"] * 4},
    frozenset({"block_out_channels", "scaling_factor"}), frozenset({"sample_size", "force_upcast"}), _plan)

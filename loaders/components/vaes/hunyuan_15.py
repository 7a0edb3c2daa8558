"""diffusers AutoencoderKLHunyuanVideo15, and AutoencoderKLHunyuanImageRefiner, which is the same for single frames."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ....host.texts import Text
from .base import Latents, Plan, VAEClass, scaled
from .hunyuan_image import middles, renamed, widths_of
from .hunyuan_video import causal

LATENT, SPATIAL, TEMPORAL = 32, 16, 4
WIDTHS = [128, 256, 512, 1024, 1024]
SCALE = 1.03682
_LEAVES = {"conv_shortcut.": "nin_shortcut."}


def names() -> dict[str, str]:
    """Beginnings of diffusers' names -> ComfyUI's."""
    table = {}
    for level in range(len(WIDTHS)):
        for half, row, resampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
            here, there = f"{half}.{row}_blocks.{level}.", f"{half}.{row}.{level}."
            table[f"{here}resnets."] = f"{there}block."
            table[f"{here}{resampler}rs.0."] = f"{there}{resampler}."
    return middles(table)


def _finish(vae: Any, frames: bool) -> None:
    """In a video a frame sees itself and those before it, as in diffusers. The layers for a time, which nobody reads,
    hold zeros, not memory that nobody has written to."""
    for half in (vae.first_stage_model.encoder, vae.first_stage_model.decoder):
        if frames:
            half.mid.attn_1.optimized_attention = causal
        for block in (half.mid.block_1, half.mid.block_2):
            for parameter in block.temb_proj.parameters():
                parameter.data.zero_()


def _plan(config: Mapping[str, Any], refiner: bool) -> Plan:
    widths = widths_of(config, WIDTHS, LATENT)
    sizes: dict[str, Any] = {
        "z_channels": LATENT, "in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "ffactor_spatial": SPATIAL,
        "ffactor_temporal": TEMPORAL, "downsample_match_channel": True, "upsample_match_channel": True}
    latents = scaled(config, SCALE)
    if refiner:  # ComfyUI's latent format has two frames of the VAE beside each other
        latents = Latents(latents.slope * LATENT, latents.offset * LATENT)
    return Plan("HunyuanImage 2.1 refiner" if refiner else "HunyuanVideo 1.5", "hunyuan_15",
                {**sizes, "block_out_channels": widths}, {**sizes, "block_out_channels": WIDTHS}, widths == WIDTHS,
                "HunyuanImage21Refiner" if refiner else "HunyuanVideo15", LATENT * (2 if refiner else 1), latents,
                partial(renamed, names(), _LEAVES), Text("widths {widths}", widths=widths),
                finish=partial(_finish, frames=not refiner))


_FIXED = {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "layers_per_block": 2,
          "spatial_compression_ratio": SPATIAL, "temporal_compression_ratio": TEMPORAL,
          "downsample_match_channel": True, "upsample_match_channel": True}
_READ = frozenset({"block_out_channels", "scaling_factor"})
HUNYUAN_VIDEO_15 = VAEClass("AutoencoderKLHunyuanVideo15", _FIXED, _READ, frozenset(), partial(_plan, refiner=False))
HUNYUAN_IMAGE_REFINER = VAEClass("AutoencoderKLHunyuanImageRefiner", _FIXED, _READ, frozenset(),
                                 partial(_plan, refiner=True))

"""diffusers AutoencoderKLCosmos (Cosmos 1, its continuous tokenizer 8x8x8): wavelets, and convolutions of space and of
time one after the other. ComfyUI's VAE normalises latents by itself, with statistics that are among its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from .base import Latents, Plan, VAEClass, normalised

if TYPE_CHECKING:
    import torch

LATENT, FRAMES = 16, 16  # channels, and the frames that there are statistics of
WIDTHS = [128, 256, 512, 512]
_LEVELS = len(WIDTHS) - 1
# Modules that are a convolution in diffusers, and hold one in ComfyUI
_CONVOLUTIONS = {"conv_s.": "0.conv3d.", "conv_t.": "1.conv3d.", "conv_shortcut.": "nin_shortcut.conv3d.",
                 "to_q.": "q.conv3d.", "to_k.": "k.conv3d.", "to_v.": "v.conv3d.", "to_out.0.": "proj_out.conv3d."}


def names() -> dict[str, str]:
    """Beginnings of diffusers' names -> ComfyUI's."""
    table = {f"{name}.": f"{name}.conv3d." for name in ("quant_conv", "post_quant_conv")}
    for half, row, resampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        middle = f"{half}.mid_block."
        table |= {f"{middle}resnets.0.": f"{half}.mid.block_1.", f"{middle}resnets.1.": f"{half}.mid.block_2.",
                  f"{middle}attentions.0.": f"{half}.mid.attn_1.0.",
                  f"{middle}temp_attentions.0.": f"{half}.mid.attn_1.1."}
        for level in range(_LEVELS):
            there = f"{half}.{row}.{level if row == 'down' else _LEVELS - 1 - level}."
            here = f"{half}.{row}_blocks.{level}."
            table[f"{here}resnets."] = f"{there}block."
            for number in range(1, 4):
                table[f"{here}{resampler}rs.0.conv{number}."] = f"{there}{resampler}.conv{number}.conv3d."
    return table


def _rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from .hunyuan_image import renamed

    return renamed(names(), _CONVOLUTIONS, tensors)


def _made(latents: Latents) -> dict[str, torch.Tensor]:
    """The statistics of config.json, which are among the tensors of ComfyUI's network."""
    import torch

    count = LATENT * FRAMES
    return {"latent_mean": torch.tensor(latents.offset * (count // len(latents.offset))),
            "latent_std": torch.tensor(latents.slope * (count // len(latents.slope)))}


def _plan(config: Mapping[str, Any]) -> Plan:
    encoder = config.get("encoder_block_out_channels") or WIDTHS
    decoder = config.get("decode_block_out_channels") or [*encoder[1:], encoder[-1]]
    if not isinstance(encoder, list) or len(encoder) != len(WIDTHS) or decoder != [*encoder[1:], encoder[-1]] or any(
            width % encoder[0] for width in encoder):
        raise ValueError(Text("config.json: widths {encoder}, decoder {decoder}; ComfyUI has four, multiples of the "
                              "first, and in the decoder the same from the second on", encoder=encoder,
                              decoder=decoder))
    sizes: dict[str, Any] = {
        "z_channels": LATENT, "latent_channels": LATENT, "z_factor": 1, "resolution": 1024, "in_channels": 3,
        "out_channels": 3, "num_res_blocks": 2, "attn_resolutions": [32], "dropout": 0.0, "patch_size": 4,
        "num_groups": 1, "temporal_compression": 8, "spacial_compression": 8}
    own = {**sizes, "channels": encoder[0], "channels_mult": [width // encoder[0] for width in encoder[1:]]}
    latents = normalised(config, LATENT * FRAMES) or Latents((1.0,), (0.0,))
    return Plan("Cosmos 1", "cosmos", own, {**sizes, "channels": WIDTHS[0], "channels_mult": [2, 4, 4]},
                encoder == WIDTHS, "Cosmos1CV8x8x8", LATENT, Latents((1.0,), (0.0,)), _rename,
                Text("widths {widths}", widths=encoder), made=partial(_made, latents),
                marks=("decoder.unpatcher3d.wavelets",))


COSMOS = VAEClass(
    "AutoencoderKLCosmos",
    {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "attention_resolutions": [32],
     "resolution": 1024, "num_layers": 2, "patch_size": 4, "patch_type": "haar", "scaling_factor": 1.0,
     "spatial_compression_ratio": 8, "temporal_compression_ratio": 8},
    frozenset({"encoder_block_out_channels", "decode_block_out_channels", "latents_mean", "latents_std"}), frozenset(),
    _plan)

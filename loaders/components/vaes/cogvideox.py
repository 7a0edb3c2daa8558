"""diffusers AutoencoderKLCogVideoX, by whose names ComfyUI goes. Both work through a video in pieces, whose group norms
are of each piece; here the pieces are diffusers', with which the model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from .base import GROUPS, Plan, VAEClass, levels, scaled

if TYPE_CHECKING:
    import torch

LATENT, TEMPORAL = 16, 4
WIDTHS = [128, 256, 256, 512]
SCALE = 1.15258426
FORMATS = {SCALE: "CogVideoX", 0.7: "CogVideoX1_5"}  # of the 2B, and of all others
FRAMES, LATENT_FRAMES = 8, 2  # of a piece


def in_pieces(half: Any, length: int, x: torch.Tensor) -> torch.Tensor:
    """One half of the network over all frames, `length` at once; the first piece has what is left over, too."""
    import torch

    frames, cache, made = x.shape[2], None, []
    first = length + frames % length if frames >= length else frames
    for piece in (x[:, :, :first], *x[:, :, first:].split(length, 2)):
        if piece.shape[2]:
            out, cache = half(piece, conv_cache=cache)
            made.append(out)
    return torch.cat(made, 2)


def _finish(vae: Any) -> None:
    model = vae.first_stage_model
    model.encode = partial(_encode, model)
    model.decode = partial(_decode, model)


def _encode(model: Any, x: torch.Tensor) -> torch.Tensor:
    return in_pieces(model.encoder, FRAMES, x).chunk(2, 1)[0]


def _decode(model: Any, z: torch.Tensor) -> torch.Tensor:
    return in_pieces(model.decoder, LATENT_FRAMES, z)


def _plan(config: Mapping[str, Any]) -> Plan:
    widths = levels(config, "block_out_channels", WIDTHS)
    sizes = {"latent_channels": LATENT, "block_out_channels": widths}
    scale = config.get("scaling_factor")
    notes = (Text("this model was trained with a picture's latents divided by their scale; ComfyUI multiplies them"),) \
        if config.get("invert_scale_latents") else ()
    return Plan("CogVideoX", "cogvideox", sizes, {"latent_channels": LATENT}, widths == WIDTHS,
                FORMATS.get(SCALE if scale is None else scale, FORMATS[SCALE]), LATENT, scaled(config, SCALE), dict,
                Text("widths {widths}", widths=widths), notes, _finish)


COGVIDEOX = VAEClass(
    "AutoencoderKLCogVideoX",
    {"in_channels": 3, "out_channels": 3, "down_block_types": ["CogVideoXDownBlock3D"] * 4,
     "up_block_types": ["CogVideoXUpBlock3D"] * 4, "latent_channels": LATENT, "layers_per_block": 3, "act_fn": "silu",
     "norm_eps": 1e-6, "norm_num_groups": GROUPS, "temporal_compression_ratio": TEMPORAL, "latents_mean": "none",
     "latents_std": "none"},
    frozenset({"block_out_channels", "scaling_factor", "shift_factor", "invert_scale_latents"}),
    frozenset({"sample_height", "sample_width", "force_upcast"}), _plan)

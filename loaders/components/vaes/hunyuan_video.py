"""diffusers AutoencoderKLHunyuanVideo (1.0). ComfyUI reads its names by itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text
from .base import CHANNELS, GROUPS, Plan, VAEClass, kl_sizes, levels, scaled

if TYPE_CHECKING:
    import torch

LATENT, TEMPORAL, SPATIAL = 16, 4, 8
# Values held at once for each pixel of a whole video, as ComfyUI estimates them for a piece (comfy/sd.py, class VAE).
DECODING, ENCODING = 2800, 1400
logger = logging.getLogger(__name__)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The attention of diffusers' middle block: a frame sees itself and those before it.

    Takes and gives [batch, channels, frames, height, width], one head. Frame by frame, so that no mask is needed.
    """
    import torch

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)[:, None]

    frames = [torch.nn.functional.scaled_dot_product_attention(tokens(q[:, :, t:t + 1]), tokens(k[:, :, :t + 1]),
                                                               tokens(v[:, :, :t + 1]))[:, 0]
              for t in range(q.shape[2])]
    return torch.cat(frames, 1).transpose(1, 2).reshape(q.shape)


def whole(half: Any, values: int, vae: Any) -> type:
    """The encoder or decoder (class `half`) of the host's `vae`, which takes a video whole where the memory is there.

    ComfyUI works through videos in pieces with group norms of each piece; diffusers' (and the model's training) are
    over the whole video. `values` are held for each of its pixels.
    """
    class Whole(half):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            frames, area = x.shape[2], x.shape[3] * x.shape[4]
            if values == DECODING:
                frames, area = (frames - 1) * TEMPORAL + 1, area * SPATIAL * SPATIAL
            needed = values * frames * area * x.shape[0] * x.element_size()
            self.carried = needed > host.free_memory(x.device, vae.patcher)
            if self.carried:
                logger.warning("HunyuanVideo's VAE takes this video in pieces: whole it needs about %.0f GB. Values "
                               "differ a little from diffusers'.", needed / 1e9)
            return super().forward(x, *args, **kwargs)

    return Whole


def _finish(vae: Any) -> None:
    for half, values in ((vae.first_stage_model.encoder, ENCODING), (vae.first_stage_model.decoder, DECODING)):
        half.__class__ = whole(type(half), values, vae)
        half.mid.attn_1.optimized_attention = causal


def _plan(config: Mapping[str, Any]) -> Plan:
    widths = levels(config, "block_out_channels", CHANNELS)
    video: dict[str, Any] = {"conv3d": True, "time_compress": TEMPORAL}
    return Plan("HunyuanVideo", "kl", kl_sizes(LATENT, widths, widths, **video),
                kl_sizes(LATENT, CHANNELS, CHANNELS, **video), widths == CHANNELS, "HunyuanVideo", LATENT,
                scaled(config, 0.476986), host.diffusers_vae_names, Text("widths {widths}", widths=widths),
                (Text("videos are taken whole, as diffusers does, where the memory is there; else in pieces, as "
                      "ComfyUI does, with slightly other values (the log says so)"),), _finish)


HUNYUAN_VIDEO = VAEClass(
    "AutoencoderKLHunyuanVideo",
    {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "layers_per_block": 2, "act_fn": "silu",
     "norm_num_groups": GROUPS, "mid_block_add_attention": True, "spatial_compression_ratio": SPATIAL,
     "temporal_compression_ratio": TEMPORAL, "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
     "up_block_types": ["HunyuanVideoUpBlock3D"] * 4},
    frozenset({"block_out_channels", "scaling_factor"}), frozenset({"sample_size", "force_upcast"}), _plan)

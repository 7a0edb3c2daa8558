"""PixArt-Sigma and PixArt-Alpha (comfy/ldm/pixart/pixartms.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

BASE = 32  # the positions that ComfyUI spreads over any picture, of its smallest side's multiples of 512 pixels


def _others(config: Mapping[str, Any]) -> str:
    """ComfyUI computes positions as for the published sizes of a picture, and knows PixArt-Alpha, whose latents are
    not Sigma's, by its additional conditions alone. Alpha's configurations say nothing of those, Sigma's no."""
    size, scale = config.get("sample_size"), config.get("interpolation_scale")
    if not size:
        return ""
    if size / 2 / (scale or max(size // 64, 1)) != BASE:
        return Text("ComfyUI runs PixArt for pictures of 512 pixels and multiples only; config.json says sample_size "
                    "{size} and interpolation_scale {scale}", size=size, scale=scale)
    if size != 128 and config.get("use_additional_conditions") is None:
        return Text("ComfyUI takes a PixArt-Alpha without additional conditions for a PixArt-Sigma, which has other "
                    "latents; config.json says sample_size {size} and nothing of use_additional_conditions", size=size)
    return ""


CLASS = Derived(
    title="PixArt", hosts=("PixArtSigma", "PixArtAlpha"), table="pixart",
    classes=("PixArtTransformer2DModel", "Transformer2DModel"),  # the other is what older configurations say
    marks=("adaln_single.emb.timestep_embedder.", "pos_embed.proj.", "transformer_blocks.0.attn2.to_q.",
           "caption_projection.linear_1."),
    never=("temporal_transformer_blocks.",),  # Latte
    fixed={
        "num_attention_heads": (16,), "attention_head_dim": (72,), "in_channels": (4,), "out_channels": (8,),
        "cross_attention_dim": (1152,), "caption_channels": (4096,), "patch_size": (2,), "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",), "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,), "norm_eps": (1e-6,), "attention_type": ("default",),
        "num_vector_embeds": (False,), "use_linear_projection": (False,), "only_cross_attention": (False,),
        "double_self_attention": (False,),
    },
    free=frozenset({
        "num_layers", "sample_size", "interpolation_scale", "use_additional_conditions", "dropout", "norm_num_groups",
        "num_embeds_ada_norm", "upcast_attention",
    }),
    refuses=_others,
)

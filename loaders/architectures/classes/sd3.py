"""Stable Diffusion 3 and 3.5 (comfy/ldm/modules/diffusionmodules/mmdit.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived


def _not_square(config: Mapping[str, Any]) -> str:
    """ComfyUI takes the number of heads for that of layers (comfy/ldm/modules/diffusionmodules/mmdit.py)."""
    layers, heads = config.get("num_layers") or 18, config.get("num_attention_heads") or 18
    return "" if layers == heads else Text("ComfyUI runs Stable Diffusion 3 with as many heads as layers only; "
                                           "config.json says {heads} and {layers}", heads=heads, layers=layers)


CLASS = Derived(
    title="Stable Diffusion 3", hosts=("SD3",), table="sd3", classes=("SD3Transformer2DModel",),
    marks=("pos_embed.pos_embed", "transformer_blocks.0.norm1_context.", "time_text_embed.timestep_embedder."),
    fixed={
        "attention_head_dim": (64,), "qk_norm": ("rms_norm",),
    },
    free=frozenset({
        "sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
        "dual_attention_layers",
    }),
    refuses=_not_square,
)

"""Chroma: FLUX.1 with an approximator for its modulation (comfy/ldm/chroma/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Chroma", hosts=("Chroma",), table="chroma", classes=("ChromaTransformer2DModel",),
    marks=("distilled_guidance_layer.layers.0.linear_1.", "transformer_blocks.0.attn.to_q."),
    fixed={
        "patch_size": (1,), "attention_head_dim": (128,), "num_attention_heads": (24,),
        "axes_dims_rope": ((16, 56, 56),), "approximator_num_channels": (64,), "approximator_hidden_dim": (5120,),
        "approximator_layers": (5,),
    },
    free=frozenset({
        "in_channels", "out_channels", "num_layers", "num_single_layers", "joint_attention_dim", "guidance_embeds",
        "pooled_projection_dim",
    }),
)

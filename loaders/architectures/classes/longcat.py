"""LongCat-Image and its editing model: FLUX.1's blocks, text and no pooled one (comfy/ldm/flux/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="LongCat-Image", hosts=("LongCatImage",), table="longcat", classes=("LongCatImageTransformer2DModel",),
    marks=("time_embed.timestep_embedder.linear_1.", "context_embedder.weight",
           "transformer_blocks.0.attn.norm_added_q.", "single_transformer_blocks.0.proj_mlp."),
    never=("context_embedder_norm.", "caption_projection."),  # Ovis; Bria FIBO
    fixed={
        "patch_size": (1,), "in_channels": (64,), "attention_head_dim": (128,), "joint_attention_dim": (3584,),
        "axes_dims_rope": ((16, 56, 56),),
    },
    # nothing is made of a pooled prompt
    free=frozenset({"num_layers", "num_single_layers", "num_attention_heads", "pooled_projection_dim"}),
)

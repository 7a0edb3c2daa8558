"""Ovis-Image: FLUX.1's blocks with gated MLPs, Ovis 2.5's text and no pooled one (comfy/ldm/flux/model.py, yak_mlp)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Ovis-Image", hosts=("OvisImage",), table="ovis", classes=("OvisImageTransformer2DModel",),
    marks=("context_embedder_norm.weight", "transformer_blocks.0.attn.norm_added_q.",
           "single_transformer_blocks.0.proj_mlp."),
    fixed={
        "patch_size": (1,), "in_channels": (64,), "out_channels": (64,), "attention_head_dim": (128,),
        "axes_dims_rope": ((16, 56, 56),),
    },
    free=frozenset({"num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim"}),
)

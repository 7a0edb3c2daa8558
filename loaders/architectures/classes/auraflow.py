"""AuraFlow (comfy/ldm/aura/mmdit.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="AuraFlow", hosts=("AuraFlow",), table="auraflow", classes=("AuraFlowTransformer2DModel",),
    marks=("joint_transformer_blocks.0.", "pos_embed.pos_embed", "register_tokens"),
    fixed={
        "patch_size": (2,), "in_channels": (4,), "out_channels": (4,), "attention_head_dim": (256,),
        "num_attention_heads": (12,), "caption_projection_dim": (3072,),
    },
    free=frozenset({
        "sample_size", "num_mmdit_layers", "num_single_dit_layers", "joint_attention_dim", "pos_embed_max_size",
    }),
)

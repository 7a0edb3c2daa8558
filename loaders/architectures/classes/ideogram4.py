"""Ideogram 4 (comfy/ldm/ideogram4/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Ideogram 4", hosts=("Ideogram4",), table="ideogram4", classes=("Ideogram4Transformer2DModel",),
    marks=("embed_image_indicator.weight", "layers.0.attention.to_q.", "llm_cond_proj."),
    fixed={
        "in_channels": (128,), "attention_head_dim": (256,), "num_attention_heads": (18,),
        "intermediate_size": (12288,), "adaln_dim": (512,), "llm_features_dim": (53248,),
        "rope_theta": (5_000_000, 5e6), "mrope_section": ((24, 20, 20),), "norm_eps": (1e-5,),
    },
    free=frozenset({"num_layers"}),
)

"""Mochi 1 (comfy/ldm/genmo/joint_model/asymm_models_joint.py), whose sizes are all in ComfyUI's code."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Mochi", hosts=("GenmoMochi",), table="mochi", classes=("MochiTransformer3DModel",),
    marks=("pos_frequencies", "time_embed.pooler.to_kv.", "transformer_blocks.0.attn1.add_q_proj."),
    fixed={
        "patch_size": (2,), "num_attention_heads": (24,), "attention_head_dim": (128,), "num_layers": (48,),
        "pooled_projection_dim": (1536,), "in_channels": (12,), "out_channels": (12,), "qk_norm": ("rms_norm",),
        "text_embed_dim": (4096,), "time_embed_dim": (256,), "activation_fn": ("swiglu",),
    },
    free=frozenset({"max_sequence_length"}),
)

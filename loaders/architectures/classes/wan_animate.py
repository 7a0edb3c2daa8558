"""Wan 2.2 Animate (comfy/ldm/wan/model_animate.py)."""

from __future__ import annotations

from ..derived import Derived
from .wan_vace import FIXED

CLASS = Derived(
    title="Wan Animate", hosts=("WAN22_Animate",), table="wan_animate", classes=("WanAnimateTransformer3DModel",),
    marks=("motion_encoder.motion_network.", "face_adapter.0.to_q.", "condition_embedder."),
    fixed={
        **FIXED, "latent_channels": (16,), "text_dim": (4096,), "image_dim": (1280,), "motion_encoder_size": (512,),
        "motion_style_dim": (512,), "motion_dim": (20,), "motion_encoder_dim": (512,),
        "motion_encoder_channel_sizes": (
            {"4": 512, "8": 512, "16": 512, "32": 512, "64": 256, "128": 128, "256": 64, "512": 32, "1024": 16},),
        "face_encoder_hidden_dim": (1024,), "face_encoder_num_heads": (4,), "inject_face_latents_blocks": (5,),
    },
    free=frozenset({
        "in_channels", "out_channels", "ffn_dim", "num_layers", "num_attention_heads", "added_kv_proj_dim",
        "rope_max_seq_len", "pos_embed_seq_len", "motion_encoder_batch_size",
    }),
)

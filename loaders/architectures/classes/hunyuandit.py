"""Hunyuan-DiT up to 1.1, with sizes and a style, and 1.2 (comfy/ldm/hydit/models.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Hunyuan-DiT", hosts=("HunyuanDiT", "HunyuanDiT1"), table="hunyuandit", classes=("HunyuanDiT2DModel",),
    marks=("time_extra_emb.pooler.", "text_embedding_padding", "blocks.0.attn1.to_q."),
    never=("controlnet_blocks.",),
    fixed={
        "num_attention_heads": (16,), "in_channels": (4,), "patch_size": (2,), "learn_sigma": (True,),
        "activation_fn": ("gelu-approximate",), "norm_type": ("layer_norm",), "cross_attention_dim": (1024,),
        "cross_attention_dim_t5": (2048,), "pooled_projection_dim": (1024,), "text_len": (77,),
        "text_len_t5": (256,),
    },
    # positions are those of a picture of 512 pixels on both sides, whatever sample_size says
    free=frozenset({
        "attention_head_dim", "hidden_size", "num_layers", "mlp_ratio", "sample_size",
        "use_style_cond_and_image_meta_size",
    }),
)

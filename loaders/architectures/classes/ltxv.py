"""LTX-Video 0.9 (comfy/ldm/lightricks/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="LTX-Video", hosts=("LTXV",), table="ltxv", classes=("LTXVideoTransformer3DModel",),
    never=("audio_",),  # LTX-2
    marks=("proj_in.", "caption_projection.linear_1.", "transformer_blocks.0.attn1.norm_q."),
    fixed={
        "patch_size": (1,), "patch_size_t": (1,), "num_attention_heads": (32,), "norm_eps": (1e-6,),
        "activation_fn": ("gelu-approximate",), "qk_norm": ("rms_norm_across_heads",),
        "norm_elementwise_affine": (False,), "attention_bias": (True,), "attention_out_bias": (True,),
    },
    free=frozenset({
        "in_channels", "out_channels", "attention_head_dim", "cross_attention_dim", "num_layers", "caption_channels",
    }),
)

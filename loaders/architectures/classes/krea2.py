"""Krea-2 (comfy/ldm/krea2/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Krea-2", hosts=("Krea2",), table="krea2", classes=("Krea2Transformer2DModel",),
    marks=("text_fusion.", "final_layer.scale_shift_table"),
    fixed={
        "attention_head_dim": (128,), "axes_dims_rope": ((32, 48, 48),), "rope_theta": (1000.0, 1000),
        "norm_eps": (1e-5,), "timestep_embed_dim": (256,), "text_num_attention_heads": (20,),
        "text_num_key_value_heads": (20,), "num_layerwise_text_blocks": (2,), "num_refiner_text_blocks": (2,),
    },
    free=frozenset({
        "in_channels", "num_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "text_hidden_dim", "num_text_layers", "text_intermediate_size",
    }),
)

"""JoyAI-Image-Edit (comfy/ldm/joyimage/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="JoyAI-Image-Edit", hosts=("JoyImage",), table="joyimage",
    classes=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    marks=("double_blocks.0.attn.img_attn_qkv.", "condition_embedder.time_embedder."),
    fixed={
        "text_dim": (4096,), "mlp_width_ratio": (4.0, 4), "rope_dim_list": ((16, 56, 56),), "rope_type": ("rope",),
        "theta": (10000, 10000.0),
    },
    free=frozenset({
        "patch_size", "in_channels", "out_channels", "hidden_size", "num_attention_heads", "num_layers",
    }),
)

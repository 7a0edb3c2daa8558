"""ERNIE-Image (comfy/ldm/ernie/model.py), whose sizes are all in ComfyUI's code."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="ERNIE-Image", hosts=("ErnieImage",), table="ernie_image", classes=("ErnieImageTransformer2DModel",),
    marks=("layers.0.mlp.linear_fc2.", "layers.0.adaLN_sa_ln.", "adaLN_modulation.1."),
    fixed={
        "hidden_size": (4096,), "num_attention_heads": (32,), "num_layers": (36,), "ffn_hidden_size": (12288,),
        "in_channels": (128,), "out_channels": (128,), "patch_size": (1,), "text_in_dim": (3072,),
        "rope_theta": (256, 256.0), "rope_axes_dim": ((32, 48, 48),), "eps": (1e-6,), "qk_layernorm": (True,),
    },
    free=frozenset(),
)

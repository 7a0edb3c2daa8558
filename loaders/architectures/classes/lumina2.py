"""Lumina 2 (comfy/ldm/lumina/model.py)."""

from __future__ import annotations

from ..derived import Derived

CLASS = Derived(
    title="Lumina 2", hosts=("Lumina2",), table="lumina2", classes=("Lumina2Transformer2DModel",),
    marks=("time_caption_embed.", "noise_refiner.0.attn.to_q."),
    never=("ref_image_refiner.",),  # OmniGen2
    fixed={
        "patch_size": (2,), "in_channels": (16,), "hidden_size": (2304,), "num_refiner_layers": (2,),
        "num_attention_heads": (24,), "num_kv_heads": (8,), "norm_eps": (1e-5,), "scaling_factor": (1.0, 1),
        "axes_dim_rope": ((32, 32, 32),),
    },
    # the lengths of axes are those of a table that ComfyUI computes as it goes
    free=frozenset({
        "sample_size", "out_channels", "num_layers", "multiple_of", "ffn_dim_multiplier", "axes_lens",
        "cap_feat_dim",
    }),
)

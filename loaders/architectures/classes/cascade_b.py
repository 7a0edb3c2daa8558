"""Stable Cascade, stage B: its decoder (comfy/ldm/cascade/stage_b.py)."""

from __future__ import annotations

from ..derived import Derived
from .cascade_c import ATTENTION, FREE, RESIDUAL, TIME, other_heads

CLASS = Derived(
    title="Stable Cascade B", hosts=("Stable_Cascade_B",), table="cascade_b", classes=("StableCascadeUNet",),
    marks=("effnet_mapper.", "pixels_mapper.", "clip_txt_pooled_mapper.", "down_blocks.0.0.channelwise."),
    never=("clip_txt_mapper.",),
    fixed={
        "in_channels": (4,), "out_channels": (4,), "patch_size": (2,), "timestep_ratio_embedding_dim": (64,),
        "clip_seq": (4,), "kernel_size": (3,), "self_attn": (True,), "timestep_conditioning_type": (("sca",),),
        "effnet_in_channels": (16,), "pixel_mapper_in_channels": (3,), "switch_level": (False,),
        "block_types_per_layer": (([RESIDUAL, TIME], [RESIDUAL, TIME], *[[RESIDUAL, TIME, ATTENTION]] * 2),),
    },
    free=FREE, refuses=other_heads,
)

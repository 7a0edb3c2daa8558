"""Stable Cascade, stage C: its prior (comfy/ldm/cascade/stage_c.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

HEAD = 64  # of the published sizes, which comfy/model_detection.py lists
RESIDUAL, TIME, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def other_heads(config: Mapping[str, Any]) -> str:
    """Where a level with attention has heads of another width, which no shape tells."""
    widths, heads = config.get("block_out_channels") or (), config.get("num_attention_heads") or ()
    kinds = config.get("block_types_per_layer") or [[ATTENTION]] * len(widths)
    if any(ATTENTION in kind and width != HEAD * count
           for kind, width, count in zip(kinds, widths, heads, strict=False)):
        return Text("ComfyUI runs Stable Cascade with attention heads of {head} only; config.json says {heads} heads "
                    "in blocks of {widths}", head=HEAD, heads=", ".join(map(str, heads)),
                    widths=", ".join(map(str, widths)))
    return ""


# What sizes tell, or what nothing depends on, in both stages.
FREE = frozenset({
    "conditioning_dim", "block_out_channels", "num_attention_heads", "down_num_layers_per_block",
    "up_num_layers_per_block", "down_blocks_repeat_mappers", "up_blocks_repeat_mappers", "clip_text_in_channels",
    "clip_text_pooled_in_channels", "clip_image_in_channels", "dropout",
})

CLASS = Derived(
    title="Stable Cascade C", hosts=("Stable_Cascade_C",), table="cascade_c", classes=("StableCascadeUNet",),
    marks=("clip_txt_mapper.", "clip_txt_pooled_mapper.", "down_blocks.0.0.channelwise."),
    never=("effnet_mapper.", ".attention.attn."),
    fixed={
        "in_channels": (16,), "out_channels": (16,), "patch_size": (1,), "timestep_ratio_embedding_dim": (64,),
        "clip_seq": (4,), "kernel_size": (3,), "self_attn": (True,), "timestep_conditioning_type": (("sca", "crp"),),
        "switch_level": ((False,),), "block_types_per_layer": (([RESIDUAL, TIME, ATTENTION],) * 2,),
        "effnet_in_channels": (False,), "pixel_mapper_in_channels": (False,),
    },
    free=FREE, refuses=other_heads,
)

"""Stable Cascade, stage B: a tiny one in diffusers and in the host."""

from __future__ import annotations

from support.derived.cascade_c import time
from support.derived_case import SIGMA, Case, Source, noise

RESIDUAL, WITH_ATTENTION = ["SDCascadeResBlock", "SDCascadeTimestepBlock"], ["SDCascadeResBlock", "SDCascadeTimestepBlock",
                                                                         "SDCascadeAttnBlock"]
KIND = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "block_types_per_layer": [RESIDUAL] * 2 + [WITH_ATTENTION] * 2,
        "down_blocks_repeat_mappers": [1, 1, 1, 1], "up_blocks_repeat_mappers": [3, 3, 2, 2], "effnet_in_channels": 16,
        "pixel_mapper_in_channels": 3, "timestep_conditioning_type": ["sca"], "dropout": [0.1] * 4, "self_attn": True}
REAL = {**KIND, "conditioning_dim": 1280, "block_out_channels": [320, 640, 1280, 1280], "num_attention_heads": [-1, -1, 20, 20],
        "down_num_layers_per_block": [2, 6, 28, 6], "up_num_layers_per_block": [6, 28, 6, 2]}
LITE = {"block_out_channels": [320, 576, 1152, 1152], "num_attention_heads": [-1, 9, 18, 18], "up_blocks_repeat_mappers": [2] * 4,
        "down_num_layers_per_block": [2, 4, 14, 4], "up_num_layers_per_block": [4, 14, 4, 2]}
SOURCE = Source(("Stable Cascade B",), real=(REAL, {**REAL, **LITE}))


def forward(net, x, pooled, prior):
    given = x / (SIGMA ** 2 + 1) ** 0.5  # EPS.calculate_input of comfy/model_sampling.py
    return net(given, time(), pooled, effnet=prior, return_dict=False)[0]


CASES = (Case(
    {**KIND, "conditioning_dim": 64, "block_out_channels": [32, 64, 64, 64], "num_attention_heads": [-1, -1, 2, 2],
     "down_num_layers_per_block": [1, 1, 2, 1], "up_num_layers_per_block": [1, 2, 1, 1], "clip_text_pooled_in_channels": 96},
    "Stable Cascade B", forward, lambda: (noise(1, 4, 32, 48), noise(1, 1, 96), noise(1, 16, 3, 4)),
    lambda x, pooled, prior: {"clip": pooled, "effnet": prior},
    ("down_blocks.2.2.attention.to_out.0", "down_blocks.2.2.attention.attn.out_proj"), maps=False),)

"""Stable Cascade, stage C: a tiny one in diffusers and in the host."""

from __future__ import annotations

import math

import torch

from support.derived_case import SIGMA, Case, Source, noise

REAL = {"clip_text_in_channels": 1280, "clip_image_in_channels": 768, "switch_level": [False]}
LITE = {"conditioning_dim": 1536, "block_out_channels": [1536, 1536], "num_attention_heads": [24, 24],
        "down_num_layers_per_block": [4, 12], "up_num_layers_per_block": [12, 4]}
SOURCE = Source(("Stable Cascade C",), real=(REAL, {**REAL, **LITE}))


def time() -> torch.Tensor:
    """As StableCascadeSampling of comfy/model_sampling.py has it, of SIGMA."""
    first = torch.cos(torch.tensor(8e-3) / 1.008 * torch.pi * 0.5) ** 2
    return ((first / (SIGMA ** 2 + 1)) ** 0.5).acos() / (math.pi * 0.5) * 1.008 - 8e-3


def forward(net, x, text, pooled, picture):
    given = x / (SIGMA ** 2 + 1) ** 0.5  # EPS.calculate_input of comfy/model_sampling.py
    return net(given, time(), pooled, text, picture, return_dict=False)[0]


CASES = (Case(
    {"conditioning_dim": 64, "block_out_channels": [64, 64], "num_attention_heads": [2, 2], "down_num_layers_per_block": [1, 2],
     "up_num_layers_per_block": [2, 1], "clip_text_in_channels": 96, "clip_text_pooled_in_channels": 96,
     "clip_image_in_channels": 128, "switch_level": [False]},
    "Stable Cascade C", forward, lambda: (noise(1, 16, 8, 12), noise(1, 7, 96), noise(1, 1, 96), noise(1, 1, 128)),
    lambda x, text, pooled, picture: {"clip_text": text, "clip_text_pooled": pooled, "clip_img": picture},
    ("down_blocks.0.2.attention.to_out.0", "down_blocks.0.2.attention.attn.out_proj"), maps=False),)

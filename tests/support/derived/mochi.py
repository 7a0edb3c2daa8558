"""Mochi: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("Mochi 1",), "convert_mochi_transformer_checkpoint_to_diffusers", {48: 2})
MASK = torch.tensor([[True] * 5 + [False] * 2])


def forward(net, x, text):
    # time and velocity run the other way: comfy/ldm/genmo/joint_model/asymm_models_joint.py, `1 - sigma` and `return -x`
    return -net(x, text, (1 - SIGMA) * 1000, MASK, return_dict=False)[0]


CASES = (Case(
    {"num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 2, "pooled_projection_dim": 96, "text_embed_dim": 128},
    "Mochi 1", forward, lambda: (noise(1, 12, 2, 8, 6), noise(1, 7, 128)),
    lambda x, text: {"c_crossattn": text, "attention_mask": MASK, "num_tokens": 5},
    ("transformer_blocks.0.attn1.to_out.0", "blocks.0.attn.proj_x"), maps=False),)

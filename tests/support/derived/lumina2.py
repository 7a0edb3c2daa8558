"""Lumina 2: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, picture

SOURCE = Source(("Lumina 2",), "convert_lumina2_to_diffusers", {2304: 96, 768: 48})


def forward(net, x, text):
    return -net(x, 1 - SIGMA, text, torch.ones(text.shape[:2], dtype=torch.bool), return_dict=False)[0]


CASES = (Case(
    {"hidden_size": 96, "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
     "axes_dim_rope": [8, 8, 8], "axes_lens": [300, 512, 512], "cap_feat_dim": 64},
    "Lumina 2", forward, lambda: picture(64),
    lambda x, text: {"c_crossattn": text, "num_tokens": text.shape[1]},
    ("layers.0.attn.to_out.0", "layers.0.attention.out"), maps=False),)

"""Wan VACE: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("Wan VACE",), "convert_wan_transformer_to_diffusers")


def forward(net, x, text, context):
    return net(x, SIGMA * 1000, text, control_hidden_states=context, control_hidden_states_scale=torch.ones(2),
               return_dict=False)[0]


CASES = (Case(
    {"patch_size": [1, 2, 2], "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16,
     "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 256, "num_layers": 4, "vace_layers": [0, 2],
     "vace_in_channels": 96},
    "Wan VACE", forward, lambda: (noise(1, 16, 1, 8, 8), noise(1, 7, 4096), noise(1, 96, 1, 8, 8)),
    lambda x, text, context: {"c_crossattn": text, "vace_context": context[:, None], "vace_strength": [1.0]},
    ("blocks.0.attn1.to_out.0", "blocks.0.self_attn.o"), maps=False),)

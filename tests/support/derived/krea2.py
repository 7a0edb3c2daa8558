"""Krea-2: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, grid, noise, patches, pictures

SOURCE = Source(("Krea-2",), "convert_krea2_transformer_checkpoint_to_diffusers")


def forward(net, x, text):
    ids = torch.cat([torch.zeros(text.shape[1], 3), grid(x.shape[2] // 2, x.shape[3] // 2)])
    return pictures(net(patches(x), text, SIGMA, ids, return_dict=False)[0], *x.shape[2:])


CASES = (Case(
    {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
     "intermediate_size": 768, "text_hidden_dim": 160, "num_text_layers": 3, "text_num_attention_heads": 20,
     "text_num_key_value_heads": 20, "text_intermediate_size": 512},
    "Krea-2", forward, lambda: (noise(1, 16, 8, 12), noise(1, 7, 3, 160)),
    lambda x, text: {"c_crossattn": text.flatten(2)},
    ("transformer_blocks.0.attn.to_out.0", "blocks.0.attn.wo")),)

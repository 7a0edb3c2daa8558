"""LTX-Video: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("LTX-Video",), "convert_ltx_transformer_checkpoint_to_diffusers")


def forward(net, x, text):
    b, c, f, h, w = x.shape
    out = net(x.flatten(2).transpose(1, 2), text, SIGMA * 1000, torch.ones(b, text.shape[1]), f, h, w,
              rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False)[0]
    return out.transpose(1, 2).reshape(b, c, f, h, w)


CASES = (Case(
    {"num_attention_heads": 32, "attention_head_dim": 4, "cross_attention_dim": 128, "num_layers": 2,
     "caption_channels": 4096},
    "LTX-Video", forward, lambda: (noise(1, 128, 2, 4, 3), noise(1, 7, 4096)),
    lambda x, text: {"c_crossattn": text, "attention_mask": None, "frame_rate": 25},
    ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_out.0"), maps=False),)

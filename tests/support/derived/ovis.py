"""Ovis-Image: a hand-written table, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, grid, patches, picture, pictures

SOURCE = Source(("Ovis-Image",))


def forward(net, x, text):
    out = net(patches(x), text, SIGMA, grid(x.shape[2] // 2, x.shape[3] // 2),
              torch.arange(text.shape[1])[:, None] * torch.tensor([0., 1., 1.]), return_dict=False)[0]
    return pictures(out, *x.shape[2:])


CASES = (Case(
    {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
    "Ovis-Image", forward, lambda: picture(64), lambda x, text: {"c_crossattn": text},
    ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")),)

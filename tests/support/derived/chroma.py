"""Chroma: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, grid, patches, picture, pictures

SOURCE = Source(("Chroma",), "convert_chroma_transformer_checkpoint_to_diffusers", {3072: 128}, "", (r"(norms\.\d+|_norm)\.weight$", r"\1.scale"))


def forward(net, x, text):
    out = net(patches(x), text, SIGMA, img_ids=grid(x.shape[2] // 2, x.shape[3] // 2), txt_ids=torch.zeros(text.shape[1], 3),
              return_dict=False)[0]
    return pictures(out, *x.shape[2:])


CASES = (Case(
    {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 1,
     "joint_attention_dim": 64, "approximator_hidden_dim": 96, "approximator_layers": 2},
    "Chroma", forward, lambda: picture(64),
    lambda x, text: {"c_crossattn": text, "guidance": torch.zeros(1)},
    ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")),)

"""ERNIE-Image: a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, picture

SOURCE = Source(("ERNIE-Image",), real=({
    "hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072},))


def forward(net, x, text):
    return net(x, SIGMA * 1000, text, torch.tensor([text.shape[1]]), return_dict=False)[0]


CASES = (Case(
    {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 384, "text_in_dim": 64},
    "ERNIE-Image", forward, lambda: picture(64, channels=128),
    lambda x, text: {"c_crossattn": text},
    ("layers.0.self_attention.to_out.0", "layers.0.self_attention.to_out.0")),)

"""Ideogram 4: a hand-written table, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, grid, noise

SOURCE = Source(("Ideogram 4",))
CONFIG = {"in_channels": 128, "num_layers": 2, "attention_head_dim": 256, "num_attention_heads": 1, "intermediate_size": 256,
          "adaln_dim": 64, "llm_features_dim": 96}
LORA = ("layers.0.attention.to_out.0", "layers.0.attention.o")


def forward(net, x, text):
    (_, channels, h, w), count = x.shape, text.shape[1]
    # a token's channels: those of one of its four pixels after those of another (ideogram4/model.py, _img_to_tokens)
    tokens = x.reshape(1, channels // 4, 4, h * w).permute(0, 3, 2, 1).reshape(1, h * w, channels)
    places = torch.cat([torch.arange(count)[:, None].expand(count, 3), grid(h, w).long() + 65536])[None]
    kinds = torch.tensor([3] * count + [2] * (h * w))[None]
    out = net(torch.nn.functional.pad(tokens, (0, 0, count, 0)), 1 - SIGMA, torch.nn.functional.pad(text, (0, 0, 0, h * w)),
              places, torch.ones_like(kinds), kinds, return_dict=False)[0][:, count:]
    # time runs the other way, and so does the velocity (ideogram4/model.py, _forward)
    return -out.reshape(1, h * w, 4, channels // 4).permute(0, 3, 2, 1).reshape(x.shape)


CASES = (Case(CONFIG, "Ideogram 4", forward, lambda: (noise(1, 128, 4, 6), noise(1, 7, 96)),
              lambda x, text: {"c_crossattn": text}, LORA, maps=False),)

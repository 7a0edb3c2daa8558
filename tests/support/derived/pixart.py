"""PixArt: a tiny Sigma and a tiny Alpha in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, discrete, noise

SOURCE = Source(("PixArt-Sigma", "PixArt-Alpha"), unread=("y_embedder.y_embedding", "pos_embed"), real=(
    {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}, {"caption_channels": 4096}))
LAYER = ("transformer_blocks.0.attn1.to_out.0", "blocks.0.attn.proj")


def forward(net, x, text):
    h, w = x.shape[2:]
    # what EPS.calculate_input of comfy/model_sampling.py gives the model, and the schedule of supported_models.PixArtAlpha
    given, time = x / (SIGMA ** 2 + 1) ** 0.5, discrete(torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64))
    added = {"resolution": torch.tensor([[h * 8.0, w * 8.0]]), "aspect_ratio": torch.tensor([[h / w]])}
    # half of the channels are a variance that nothing asks for
    return net(given, text, time, added, return_dict=False)[0][:, :4]


def inputs():
    return noise(1, 4, 48, 64), noise(1, 7, 64)  # below 512 pixels the host's positions are no numbers


def conds(x, text):
    return {"c_crossattn": text}


CASES = (
    Case({"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "cross_attention_dim": 32,
          "sample_size": 64, "caption_channels": 64, "use_additional_conditions": False},
         "PixArt-Sigma", forward, inputs, conds, LAYER),
    Case({"num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 2, "cross_attention_dim": 96,
          "sample_size": 64, "caption_channels": 64, "use_additional_conditions": True},
         "PixArt-Alpha", forward, inputs, conds, LAYER))

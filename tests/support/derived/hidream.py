"""HiDream-I1: a tiny one in diffusers and in the host."""

from __future__ import annotations

from support.derived_case import SIGMA, Case, Source, noise
from support.host_models import MODELS

SOURCE = Source(("HiDream-I1",), real=({
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": [64, 32, 32],
    "llama_layers": [*range(32), *[31] * 16]},))


def forward(net, x, text, llama, pooled):
    return -net(x, SIGMA * 1000, text, llama.movedim(1, 0), pooled, return_dict=False)[0]  # the host's _forward negates


CASES = (Case(
    {key: value for key, value in MODELS["HiDream-I1"][1].items() if key != "image_model"},
    "HiDream-I1", forward, lambda: (noise(1, 16, 8, 8), noise(1, 7, 64), noise(1, 2, 5, 64), noise(1, 32)),
    lambda x, text, llama, pooled: {"c_crossattn": text, "encoder_hidden_states_llama3": llama, "y": pooled},
    ("double_stream_blocks.0.block.attn1.to_out", "double_stream_blocks.0.block.attn1.to_out")),)

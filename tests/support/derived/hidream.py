"""HiDream-I1: a tiny one in diffusers and in the host."""

from __future__ import annotations

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("HiDream-I1",), real=({
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": [64, 32, 32],
    "llama_layers": [*range(32), *[31] * 16]},))


def forward(net, x, text, llama, pooled):
    return -net(x, SIGMA * 1000, text, llama.movedim(1, 0), pooled, return_dict=False)[0]  # the host's _forward negates


CASES = (Case(
    {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1,
     "caption_channels": [64, 64], "text_emb_dim": 32, "axes_dims_rope": [64, 32, 32], "llama_layers": [0, 1, 1]},
    "HiDream-I1", forward, lambda: (noise(1, 16, 8, 8), noise(1, 7, 64), noise(1, 2, 5, 64), noise(1, 32)),
    lambda x, text, llama, pooled: {"c_crossattn": text, "encoder_hidden_states_llama3": llama, "y": pooled},
    ("double_stream_blocks.0.block.attn1.to_out", "double_stream_blocks.0.block.attn1.to_out")),)

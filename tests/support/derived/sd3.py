"""Stable Diffusion 3: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

from support.derived_case import SIGMA, Case, Source, noise, picture

SOURCE = Source(("SD3.5 M", "SD3 M"), "convert_sd3_transformer_checkpoint_to_diffusers")


def forward(net, x, text, pooled):
    return net(x, text, pooled, SIGMA * 1000, return_dict=False)[0]


CASES = (Case(
    {"sample_size": 16, "num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 3, "joint_attention_dim":
     64, "caption_projection_dim": 192, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
     "dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
    "SD3.5 M", forward, lambda: (*picture(64), noise(1, 32)),
    lambda x, text, pooled: {"c_crossattn": text, "y": pooled},
    ("transformer_blocks.0.attn.to_out.0", "joint_blocks.0.x_block.attn.proj")),)

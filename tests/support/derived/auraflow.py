"""AuraFlow: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

from support.derived_case import SIGMA, Case, Source, picture

SOURCE = Source(("AuraFlow",), "convert_auraflow_transformer_checkpoint_to_diffusers")


def forward(net, x, text):
    return net(x, text, SIGMA, return_dict=False)[0]


CASES = (Case(
    {"sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 32,
     "num_attention_heads": 4, "joint_attention_dim": 2048, "caption_projection_dim": 128, "pos_embed_max_size": 64},
    "AuraFlow", forward, lambda: picture(2048, channels=4),
    lambda x, text: {"c_crossattn": text},
    ("joint_transformer_blocks.0.attn.to_out.0", "double_layers.0.attn.w2o")),)

"""Cosmos 1: its table's source, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

# diffusers' converter looks for Cosmos 1's names where it has taken them out already, and takes all for Predict 2's
SOURCE = Source(("Cosmos 1", "Cosmos 1 I2V"), "convert_cosmos_transformer_checkpoint_to_diffusers", {}, "net.",
                mended={"weight\" in checkpoint:": "weight\" in converted_state_dict:"})


def forward(net, x, text, mask=None):
    # what the host's network is given and what becomes of its output: comfy/model_sampling.py, EDM, sigma_data 0.5
    scale = (SIGMA ** 2 + 0.5 ** 2) ** 0.5
    out = net(x / scale, 0.25 * SIGMA.log(), text, condition_mask=mask, padding_mask=torch.zeros(1, 1, *x.shape[3:]),
              return_dict=False)[0]
    return (x - (x * 0.5 ** 2 / scale ** 2 + out * SIGMA * 0.5 / scale)) / SIGMA


CONFIG = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2,
          "text_embed_dim": 1024, "extra_pos_embed_type": "learnable", "rope_scale": [2.0, 1.0, 1.0]}
LORA = ("transformer_blocks.1.attn1.to_q", "blocks.block1.blocks.0.block.attn.to_q.0")
CASES = (
    Case(CONFIG, "Cosmos 1", forward, lambda: (noise(1, 16, 2, 8, 6), noise(1, 7, 1024)),
         lambda x, text: {"c_crossattn": text}, LORA, maps=False),
    Case({**CONFIG, "in_channels": 17}, "Cosmos 1 I2V", forward,
         lambda: (noise(1, 16, 2, 8, 6), noise(1, 7, 1024), noise(1, 1, 2, 8, 6)),
         lambda x, text, mask: {"c_crossattn": text, "c_concat": mask}, LORA, maps=False),
)

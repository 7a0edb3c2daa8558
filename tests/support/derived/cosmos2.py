"""Cosmos Predict 2: its table's source, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("Cosmos Predict 2", "Cosmos Predict 2 I2V"), "convert_cosmos_transformer_checkpoint_to_diffusers", {}, "net.")


def forward(net, x, text, mask=None):
    # what the host's network is given and what becomes of its output: comfy/model_sampling.py, COSMOS_RFLOW
    time = SIGMA / (SIGMA + 1)
    out = net(x * (1 - time), time, text, condition_mask=mask, padding_mask=torch.zeros(1, 1, *x.shape[3:]),
              return_dict=False)[0]
    return (x - (x * (1 - time) - out * time)) / SIGMA


CONFIG = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2,
          "text_embed_dim": 1024, "extra_pos_embed_type": None, "rope_scale": [1.0, 4.0, 4.0]}
LORA = ("transformer_blocks.1.attn1.to_q", "blocks.1.self_attn.q_proj")
CASES = (
    Case(CONFIG, "Cosmos Predict 2", forward, lambda: (noise(1, 16, 2, 8, 6), noise(1, 7, 1024)),
         lambda x, text: {"c_crossattn": text}, LORA, maps=False),
    Case({**CONFIG, "in_channels": 17, "rope_scale": [1.0, 3.0, 3.0]}, "Cosmos Predict 2 I2V", forward,
         lambda: (noise(1, 16, 2, 8, 6), noise(1, 7, 1024), noise(1, 1, 2, 8, 6)),
         lambda x, text, mask: {"c_crossattn": text, "c_concat": mask}, LORA, maps=False),
)

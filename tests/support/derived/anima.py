"""Anima: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from support.derived import cosmos2
from support.derived_case import SIGMA, Case, Source, noise

# diffusers has no converter of the adapter, whose names are the host's below a prefix
SOURCE = Source(("Anima",), cosmos2.SOURCE.converter, {}, "net.", by_hand=((r"^llm_adapter\.", ""),),
                apart=("embed.", "in_proj.", "out_proj.", "norm.", "blocks."))
ADAPTER = {"_class_name": "AnimaTextConditioner", "source_dim": 32, "target_dim": 32, "model_dim": 64, "num_layers": 1,
           "num_attention_heads": 2}
CONFIG = {**cosmos2.CONFIG, "text_embed_dim": 32, "adaln_lora_dim": 64}


def forward(net, x, text, ids):
    with torch.no_grad():
        adapted = net.companions["text_conditioner"](text, ids)
    return net(x, SIGMA, pad(adapted, (0, 0, 0, 512 - adapted.shape[1])), padding_mask=torch.zeros(1, 1, *x.shape[3:]),
               return_dict=False)[0]


CASES = (
    Case(CONFIG, "Anima", forward,
         lambda: (noise(1, 16, 1, 8, 6), noise(1, 7, 32), torch.randint(0, 32128, (1, 9), generator=torch.Generator().manual_seed(1))),
         lambda x, text, ids: {"c_crossattn": text, "t5xxl_ids": ids}, cosmos2.LORA, maps=False,
         companions={"text_conditioner": ADAPTER}),
)

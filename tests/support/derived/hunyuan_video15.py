"""HunyuanVideo 1.5: a hand-written table, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("HunyuanVideo 1.5",))
CONFIG = {"in_channels": 65, "out_channels": 32, "num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2,
          "num_refiner_layers": 2, "patch_size": 1, "text_embed_dim": 64, "text_embed_2_dim": 1472, "image_embed_dim": 1152}
LORA = ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")


def forward(net, x, text, glyphs, image, beside, **more):
    x = torch.cat([x, beside], 1)
    return net(x, SIGMA * 1000, text, torch.ones(text.shape[:2]), encoder_hidden_states_2=glyphs,
               encoder_attention_mask_2=torch.ones(glyphs.shape[:2]), image_embeds=image, return_dict=False, **more)[0]


def next_time(net, *given):
    """A model that is told the next time, too; the host looks it up in the sampler's (hunyuan_video/model.py, time_r_in)."""
    return forward(net, *given, timestep_r=SIGMA * 500)


def inputs(beside=33):
    return lambda: (noise(1, 32, 2, 4, 6), noise(1, 7, 64), noise(1, 5, 1472), noise(1, 3, 1152), noise(1, beside, 2, 4, 6))


def conds(x, text, glyphs, image, beside):
    return {"c_crossattn": text, "txt_byt5": glyphs, "clip_fea": image, "c_concat": beside,
            "transformer_options": {"sigmas": SIGMA, "sample_sigmas": torch.tensor([0.5, 0.25])}}


CASES = (Case(CONFIG, "HunyuanVideo 1.5", forward, inputs(), conds, LORA, maps=False),
         Case({**CONFIG, "use_meanflow": True}, "step distilled", next_time, inputs(), conds, LORA, maps=False),
         Case({**CONFIG, "in_channels": 98, "use_meanflow": True}, "SR distilled", next_time, inputs(66), conds, LORA, maps=False))

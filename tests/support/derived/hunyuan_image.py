"""HunyuanImage 2.1: a hand-written table, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("HunyuanImage 2.1 distilled", "HunyuanImage 2.1 refiner"))
CONFIG = {"in_channels": 64, "out_channels": 64, "num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2,
          "text_embed_dim": 64, "text_embed_2_dim": 1472}
LORA = ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")
GUIDANCE = 3.5


def forward(net, x, text, glyphs=None, **more):
    masks = [None if states is None else torch.ones(states.shape[:2]) for states in (text, glyphs)]
    return net(x, SIGMA * 1000, text, masks[0], encoder_hidden_states_2=glyphs, encoder_attention_mask_2=masks[1],
               return_dict=False, **more)[0]


def distilled(net, x, text, glyphs):
    """It is told the next time, too; the host looks it up in the sampler's (hunyuan_video/model.py, time_r_in)."""
    return forward(net, x, text, glyphs, timestep_r=SIGMA * 500, guidance=torch.tensor([GUIDANCE * 1000]))


def refined(net, x, text, image):
    return forward(net, torch.cat([x, image], 1), text, guidance=torch.tensor([GUIDANCE * 1000]))


def inputs():
    return noise(1, 64, 4, 6), noise(1, 7, 64), noise(1, 5, 1472)


def conds(x, text, glyphs):
    return {"c_crossattn": text, "txt_byt5": glyphs, "guidance": torch.tensor([GUIDANCE]),
            "transformer_options": {"sigmas": SIGMA, "sample_sigmas": torch.tensor([0.5, 0.25])}}


CASES = (
    Case(CONFIG, "plain", forward, inputs, conds, LORA, maps=False),
    Case({**CONFIG, "guidance_embeds": True, "use_meanflow": True}, "HunyuanImage 2.1 distilled", distilled, inputs, conds, LORA,
         maps=False),
    Case({**CONFIG, "in_channels": 128, "text_embed_2_dim": None, "patch_size": [1, 1, 1], "rope_axes_dim": [16, 56, 56],
          "guidance_embeds": True}, "HunyuanImage 2.1 refiner", refined,
         lambda: (noise(1, 64, 2, 4, 6), noise(1, 7, 64), noise(1, 64, 2, 4, 6)),
         # the host never tells the refiner the next time (comfy/model_base.py, HunyuanImage21Refiner)
         lambda x, text, image: {"c_crossattn": text, "c_concat": image, "guidance": torch.tensor([GUIDANCE]),
                                 "disable_time_r": True}, LORA, maps=False))
REFUSED = (
    ({"patch_size": [1, 1, 1]}, "its refiner with"),
    ({"patch_size": [1, 1, 1], "in_channels": 128}, "its refiner with"),
    ({"patch_size": [1, 1, 1], "in_channels": 64, "rope_axes_dim": [16, 56, 56]}, "its refiner with"),
    ({"in_channels": 128}, "its refiner with"),
    ({"patch_size": [2, 2]}, "patch_size"),
    ({"patch_size": [1, 1, 1], "in_channels": 128, "rope_axes_dim": [16, 56, 56]}, ""))

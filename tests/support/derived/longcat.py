"""LongCat-Image: a hand-written table, and a tiny one in diffusers and in the host, alone and with a picture to edit."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, grid, noise, patches, picture, pictures

SOURCE = Source(("LongCat-Image",))
CONFIG = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 3584}
LORA = ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")


def forward(net, x, text, *references):
    count = text.shape[1]
    ids = [grid(one.shape[2] // 2, one.shape[3] // 2) + torch.tensor([1. + at, count, count])
           for at, one in enumerate((x, *references))]
    out = net(torch.cat([patches(one) for one in (x, *references)], 1), text, SIGMA, torch.cat(ids),
              torch.arange(count)[:, None] * torch.tensor([0., 1., 1.]), return_dict=False)[0]
    return pictures(out[:, :len(ids[0])], *x.shape[2:])


CASES = (Case(CONFIG, "LongCat-Image", forward, lambda: picture(3584), lambda x, text: {"c_crossattn": text}, LORA),
         Case(CONFIG, "LongCat-Image-Edit", forward, lambda: (*picture(3584), noise(1, 16, 6, 4)),
              lambda x, text, image: {"c_crossattn": text, "ref_latents": [image]}, LORA))

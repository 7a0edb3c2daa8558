"""JoyAI-Image-Edit: a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("JoyAI-Image",), real=({"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "theta": 10000},))


def forward(net, x, text, reference):
    # one tensor of all pictures, which have frames of their own; the latents come first, as in the host
    return net(torch.cat([x, reference], 2), SIGMA * 1000, text, return_dict=False)[0][:, :, :1]


def plus(net, x, text, reference):
    """Of the class for pictures of several sizes, which takes and gives patches."""
    parts = [part.unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3)[:, :, :, None]
             for part in (x, reference)]
    sizes = [(1, part.shape[3] // 2, part.shape[4] // 2) for part in (x, reference)]
    out = net(torch.cat(parts, 1), SIGMA * 1000, text, torch.ones(text.shape[:2]), [sizes], return_dict=False)[0]
    (_, h, w), own = sizes[0], out[:, :parts[0].shape[1], :, 0]
    return own.unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


CONFIG = {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "theta": 10000}
LAYER = "double_blocks.0.attn.img_attn_proj"


def inputs(*reference: int):
    return lambda: (noise(1, 16, 1, 8, 12), noise(1, 7, 4096), noise(1, 16, 1, *reference, seed=4))


def conds(x, text, reference):
    return {"c_crossattn": text, "ref_latents": [reference]}


CASES = (
    Case(CONFIG, "JoyAI-Image", forward, inputs(8, 12), conds, (LAYER, LAYER), maps=False),
    Case(CONFIG, "JoyAI-Image", plus, inputs(12, 6), conds, (LAYER, LAYER), maps=False,
         kind="JoyImageEditPlusTransformer3DModel"))

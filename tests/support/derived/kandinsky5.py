"""Kandinsky 5: a tiny one for videos and one for images, in diffusers and in the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from support.derived_case import SIGMA, Case, Source, noise

CHANNELS = {"in_visual_dim": 16, "out_visual_dim": 16}
SOURCE = Source(("Kandinsky 5", "Kandinsky 5 Image"), real=(
    {**CHANNELS, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
    {**CHANNELS, "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024, "num_text_blocks": 4, "num_visual_blocks": 60,
     "axes_dims": [32, 48, 48], "visual_cond": True},
    {**CHANNELS, "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50, "axes_dims": [32, 48, 48]}))
BLOCK = "visual_transformer_blocks.0.self_attention.out_layer"


def run(net, x, text, pooled, scale):
    from diffusers.models.transformers import transformer_kandinsky

    b, _, t, h, w = x.shape
    with pytest.MonkeyPatch.context() as patch:
        # diffusers rounds q and k to BF16 behind their rotation whatever the model is in, the host only in BF16
        patch.setattr(transformer_kandinsky, "torch", SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32}))
        out = net(x.movedim(1, -1), text, SIGMA * 1000, pooled, [torch.arange(n) for n in (t, h // 2, w // 2)],
                  torch.arange(text.shape[1]), scale, return_dict=False)
    return out.movedim(-1, 1)


def video(net, x, text, pooled, given):
    return run(net, torch.cat([x, given], 1), text, pooled, (1.0, 2.0, 2.0))


def image(net, x, text, pooled):
    return run(net, x[:, :, None], text, pooled, (1.0, 1.0, 1.0))[:, :, 0]


CASES = (
    Case({**CHANNELS, "time_dim": 64, "model_dim": 128, "ff_dim": 256, "num_text_blocks": 1,
          "num_visual_blocks": 2, "axes_dims": [16, 24, 24], "visual_cond": True},
         "Kandinsky 5", video, lambda: (noise(1, 16, 2, 8, 12), noise(1, 7, 3584), noise(1, 768), noise(1, 17, 2, 8, 12)),
         lambda x, text, pooled, given: {"c_crossattn": text, "y": pooled, "c_concat": given}, (BLOCK, BLOCK)),
    Case({**CHANNELS, "time_dim": 64, "model_dim": 128, "ff_dim": 256, "num_text_blocks": 1,
          "num_visual_blocks": 2, "axes_dims": [32, 48, 48]},
         "Kandinsky 5 Image", image, lambda: (noise(1, 16, 8, 12), noise(1, 7, 3584), noise(1, 768)),
         lambda x, text, pooled: {"c_crossattn": text, "y": pooled}, (BLOCK, BLOCK)))

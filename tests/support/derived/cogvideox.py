"""CogVideoX 1.5: tiny ones from text, from a picture and for inpainting, in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

REAL = {"num_attention_heads": 48, "num_layers": 42, "patch_size_t": 2, "use_rotary_positional_embeddings": True,
        "patch_bias": False, "sample_width": 170, "sample_height": 96, "sample_frames": 81}
SOURCE = Source(("CogVideoX 1.5", "CogVideoX 1.5 I2V", "CogVideoX-Fun 1.5 Inpaint"), real=(
    REAL, {**REAL, "in_channels": 32, "ofs_embed_dim": 512}, {**REAL, "in_channels": 48}))


def time() -> torch.Tensor:
    """The time step of SIGMA, on a schedule whose last step is all noise (comfy/model_sampling.py, zsnr)."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0).sqrt()
    kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    sigmas = ((1 - kept ** 2) / kept ** 2).sqrt()
    return (sigmas.log() - SIGMA.log()).abs().argmin()[None].float()


def forward(net, x, text, *given):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = x.shape[2] // 2, x.shape[3] // 2, x.shape[4] // 2
    positions = get_3d_rotary_pos_embed(64, None, (height, width), frames, grid_type="slice", max_size=(height, width))
    out = net(torch.cat([x, *given], 1).transpose(1, 2), text, time(), ofs=torch.full((1,), 2.0) if net.ofs_proj else None,
              image_rotary_emb=positions, return_dict=False)[0].transpose(1, 2)
    # V_PREDICTION_DDPM of comfy/model_sampling.py; the tests make a velocity of what it denoises
    noisy = (SIGMA ** 2 + 1) ** 0.5
    return (x - (x - SIGMA * out) / noisy) / SIGMA


def case(model, **config):
    given = config.get("in_channels", 16) - 16
    more = {"ofs": torch.full((1,), 2.0)} if "ofs_embed_dim" in config else {}
    return Case(
        {"num_attention_heads": 2, "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2, "patch_size_t": 2,
         "use_rotary_positional_embeddings": True, **config}, model, forward,
        lambda: (noise(1, 16, 4, 8, 12), noise(1, 7, 64), *([noise(1, given, 4, 8, 12)] if given else [])),
        lambda x, text, *given: {"c_crossattn": text, **more, **({"c_concat": given[0]} if given else {})},
        ("transformer_blocks.0.attn1.to_out.0", "blocks.0.attn_out"), maps=False)


CASES = (case("CogVideoX 1.5"), case("CogVideoX 1.5 I2V", in_channels=32, ofs_embed_dim=64),
         case("CogVideoX-Fun 1.5 Inpaint", in_channels=48))

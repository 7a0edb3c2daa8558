"""Hunyuan-DiT: a tiny 1.1 and a tiny 1.2 in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, discrete, noise

REAL = {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "sample_size": 128}
SOURCE = Source(("Hunyuan-DiT", "Hunyuan-DiT 1.1"), real=(REAL, {**REAL, "use_style_cond_and_image_meta_size": False}))
SIZES = torch.tensor([[768.0, 512.0, 640.0, 512.0, 0.0, 0.0]])  # of the picture that the model shall take this one for


def forward(net, x, text, t5, mask, mask_t5):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = (x.shape[2] // 2, x.shape[3] // 2)
    start, stop = get_resize_crop_region_for_grid(grid, 32)
    # get_meshgrid of comfy/ldm/hydit/posemb_layers.py, as in the original; diffusers' pipeline ends the longer side of a
    # picture that is not square otherwise
    rows, columns = (start[at] + torch.arange(grid[at]) * ((stop[at] - start[at]) / grid[at]) for at in (0, 1))
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[:, None]
    positions = get_2d_rotary_pos_embed_from_grid(32, places, use_real=True)
    end = 0.03 if net.config.use_style_cond_and_image_meta_size else 0.018  # HunyuanDiT and HunyuanDiT1 of supported_models.py
    time = discrete(torch.linspace(0.00085 ** 0.5, end ** 0.5, 1000, dtype=torch.float64) ** 2)
    noisy = (SIGMA ** 2 + 1) ** 0.5
    out = net(x / noisy, time, text, mask, t5, mask_t5, SIZES, torch.tensor([0]), positions, return_dict=False)[0][:, :4]
    # V_PREDICTION of comfy/model_sampling.py; the tests make a velocity of what it denoises
    return (x - (x / noisy ** 2 - out * SIGMA / noisy)) / SIGMA


def inputs():
    shown = torch.arange(7)[None]
    return noise(1, 4, 8, 12), noise(1, 7, 64), noise(1, 5, 64), shown < 5, shown[:, :5] < 2


def conds(x, text, t5, mask, mask_t5):
    return {"c_crossattn": text.clone(), "encoder_hidden_states_t5": t5, "text_embedding_mask": mask.int(),  # it writes into it
            "text_embedding_mask_t5": mask_t5.int(), "image_meta_size": SIZES}


def case(model, style):
    return Case(
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "patch_size": 2, "hidden_size": 64,
         "num_layers": 4, "cross_attention_dim": 64, "cross_attention_dim_t5": 64, "text_len": 7, "text_len_t5": 5,
         "use_style_cond_and_image_meta_size": style, "sample_size": 16}, model, forward, inputs, conds,
        ("blocks.0.attn2.to_out.0", "blocks.0.attn2.out_proj"), maps=False)


CASES = (case("Hunyuan-DiT", False), case("Hunyuan-DiT 1.1", True))

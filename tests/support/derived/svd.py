"""Stable Video Diffusion: its table by a rule, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2"}
BLOCK = [f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")] + [
    "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
TIME = ["norm_in", "ff_in.net.0.proj", "ff_in.net.2"]
TOP = {"input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
       "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.0": "conv_norm_out",
       "out.2": "conv_out"}


def resnet(native: str, stored: str) -> dict[str, str]:
    rows = {f"{native}.{old}.*": f"{stored}.spatial_res_block.{new}.*" for old, new in RESNET.items()}
    rows |= {f"{native}.time_stack.{old}.*": f"{stored}.temporal_res_block.{new}.*" for old, new in RESNET.items()}
    return rows | {f"{native}.skip_connection.*": f"{stored}.spatial_res_block.conv_shortcut.*",
                   f"{native}.time_mixer.mix_factor": f"{stored}.time_mixer.mix_factor"}


def attention(native: str, stored: str) -> dict[str, str]:
    rows = {f"{native}.{leaf}.*": f"{stored}.{leaf}.*" for leaf in ("norm", "proj_in", "proj_out")}
    rows |= {f"{native}.transformer_blocks.0.{leaf}.*": f"{stored}.transformer_blocks.0.{leaf}.*" for leaf in BLOCK}
    rows |= {f"{native}.time_stack.0.{leaf}.*": f"{stored}.temporal_transformer_blocks.0.{leaf}.*" for leaf in BLOCK + TIME}
    rows |= {f"{native}.time_pos_embed.{old}.*": f"{stored}.time_pos_embed.linear_{new}.*" for old, new in ((0, 1), (2, 2))}
    return rows | {f"{native}.time_mixer.mix_factor": f"{stored}.time_mixer.mix_factor"}


def rows() -> dict[str, list[str]]:
    """Four levels, of which three have attention, with two blocks each on the way down and three on the way up; the host
    counts them all in one row, with what is between two levels."""
    made = {f"{native}.*": f"{stored}.*" for native, stored in TOP.items()}
    for at in range(12):
        level, block = divmod(at, 3)
        if block < 2:
            made |= resnet(f"input_blocks.{at + 1}.0", f"down_blocks.{level}.resnets.{block}")
            made |= attention(f"input_blocks.{at + 1}.1", f"down_blocks.{level}.attentions.{block}") if level < 3 else {}
        elif level < 3:
            made[f"input_blocks.{at + 1}.0.op.*"] = f"down_blocks.{level}.downsamplers.0.conv.*"
        made |= resnet(f"output_blocks.{at}.0", f"up_blocks.{level}.resnets.{block}")
        made |= attention(f"output_blocks.{at}.1", f"up_blocks.{level}.attentions.{block}") if level else {}
        if block == 2 and level < 3:
            made[f"output_blocks.{at}.{2 if level else 1}.conv.*"] = f"up_blocks.{level}.upsamplers.0.conv.*"
    made |= resnet("middle_block.0", "mid_block.resnets.0") | resnet("middle_block.2", "mid_block.resnets.1")
    made |= attention("middle_block.1", "mid_block.attentions.0")
    return {native: [stored] for native, stored in made.items()}


SOURCE = Source(("Stable Video Diffusion",), rule=rows, real=({},))


def forward(net, x, text, given, ids):
    for name, module in net.named_modules():
        if "res_block.norm" in name:
            # GroupNorm's own, in ResBlock of comfy/ldm/modules/diffusionmodules/openaimodel.py, as in the original; diffusers
            # has 1e-6 in blocks with attention
            module.eps = 1e-5
    noisy = (SIGMA ** 2 + 1) ** 0.5
    # V_PREDICTION and ModelSamplingContinuousEDM of comfy/model_sampling.py; the tests make a velocity of what it denoises
    out = net(torch.cat([x / noisy, given], 1)[None], 0.25 * SIGMA.log(), text, ids, return_dict=False)[0][0]
    return (x - (x / noisy ** 2 - out * SIGMA / noisy)) / SIGMA


def conds(x, text, given, ids):
    frequencies = torch.exp(-torch.arange(32) / 32 * torch.log(torch.tensor(10000.0)))
    angles = ids[0, :, None] * frequencies
    y = torch.cat([angles.cos(), angles.sin()], -1).flatten()[None]
    return {"c_crossattn": text.expand(len(x), -1, -1), "c_concat": given, "y": y.expand(len(x), -1),
            "image_only_indicator": torch.zeros(1), "num_video_frames": len(x)}


CASES = (Case(
    {"block_out_channels": [64] * 4, "num_attention_heads": [1] * 4, "cross_attention_dim": 96, "addition_time_embed_dim": 64,
     "projection_class_embeddings_input_dim": 192},
    "Stable Video Diffusion", forward,
    lambda: (noise(3, 4, 8, 16), noise(1, 1, 96), noise(3, 4, 8, 16, seed=4), torch.tensor([[6.0, 127.0, 0.02]])), conds,
    ("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_out.0", "input_blocks.1.1.time_stack.0.attn1.to_out.0"),
    maps=False),)

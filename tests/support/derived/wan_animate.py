"""Wan Animate: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("Wan Animate",), "convert_wan_transformer_to_diffusers")


def forward(net, x, text, picture, image, pose, face):
    return net(torch.cat([x, picture], 1), SIGMA * 1000, text, image, pose, face, return_dict=False)[0]


CASES = (Case(
    {"num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 36, "ffn_dim": 256, "num_layers": 5,
     "image_dim": 1280, "added_kv_proj_dim": 128, "motion_encoder_channel_sizes":
     {"4": 32, "8": 32, "16": 32, "32": 32, "64": 16, "128": 8, "256": 8, "512": 8}, "motion_style_dim": 32,
     "motion_encoder_dim": 32, "face_encoder_hidden_dim": 32},
    # 512 tokens of text, after which diffusers looks for the picture's, and a picture of a face of 512 x 512
    "Wan Animate", forward, lambda: (noise(1, 16, 2, 4, 4), noise(1, 512, 4096), noise(1, 20, 2, 4, 4), noise(1, 5, 1280),
                                     noise(1, 16, 1, 4, 4), noise(1, 3, 1, 512, 512)),
    lambda x, text, picture, image, pose, face: {"c_crossattn": text, "c_concat": picture, "clip_fea": image,
                                                 "pose_latents": pose, "face_pixel_values": face},
    ("face_adapter.0.to_out", "face_adapter.fuser_blocks.0.linear2"), maps=False),)

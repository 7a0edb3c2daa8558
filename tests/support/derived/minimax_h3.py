"""MiniMax-H3: its table's source, and a tiny one in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

SOURCE = Source(("MiniMax-H3",), "convert_minimax_h3_transformer_checkpoint_to_diffusers")
VIDEO, AUDIO = (1, 24, 2, 4, 6), (1, 32, 2, 3)  # audio: two channels, three latents


def forward(net, x, text):
    from diffusers.modular_pipelines.minimax_h3 import before_denoise

    frames, h, w = VIDEO[2:]
    count = torch.Size(VIDEO).numel()
    video, audio = x[..., :count].reshape(VIDEO), x[..., count:].reshape(AUDIO)
    places, tags, of_video, of_audio, of_text, _, _ = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(text.shape[1]), frames, h, w, AUDIO[3], (1, 2, 2), AUDIO[2], 2, 0)
    # sound has a time of its own, and ComfyUI scales its velocity by the slope between the two: time_shift_sigma and
    # time_shift_slope in comfy/ldm/minimax/model.py, from a shift of 12 to one of 3. Its sigma is one minus the time, so the
    # velocities are negative
    base = SIGMA / (12 - 11 * SIGMA)
    other, slope = 3 * base / (1 + 2 * base), 12 / (12 - 11 * SIGMA) ** 2 * 3 / (1 + 2 * base) ** 2
    times, rows = before_denoise.MiniMaxH3SetTimestepsStep.build_row_timesteps(
        of_video, of_audio, 0, 0, text.shape[1], float(1 - SIGMA), float(1 - other), 1.0, 1.0)
    moving, sound = net(before_denoise.patchify_video_latents(video, (1, 2, 2))[None],
                        audio[0].permute(1, 2, 0).reshape(1, -1, AUDIO[1]), text, times, rows, tags, places, of_video, of_audio,
                        of_text, return_dict=False)
    moving = moving.reshape(1, frames, h // 2, w // 2, VIDEO[1], 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    sound = sound.reshape(AUDIO[2], AUDIO[3], AUDIO[1]).permute(2, 0, 1)
    return -torch.cat([moving.reshape(1, 1, -1), slope * sound.reshape(1, 1, -1)], -1)


CASES = (Case(
    {"num_attention_heads": 1, "attention_head_dim": 128, "hidden_size": 128, "num_layers": 2, "num_refiner_layers": 1,
     "ffn_dim": 256, "in_channels": 24, "audio_in_channels": 32, "text_dim": 64, "freq_dim": 64, "time_embed_hidden_dim": 96,
     "time_embed_dim": 64},
    "MiniMax-H3", forward,
    lambda: (torch.cat([noise(*VIDEO).reshape(1, 1, -1), noise(*AUDIO).reshape(1, 1, -1)], -1), noise(1, 7, 64)),
    lambda x, text: {"c_crossattn": text, "latent_shapes": [VIDEO, AUDIO]},
    ("transformer_blocks.0.attn.to_out.0", "blocks.0.attn.out_proj"), maps=False),)

"""LTX-2 and 2.3: their table's source, and tiny ones in diffusers and in the host."""

from __future__ import annotations

import torch

from support.derived_case import SIGMA, Case, Source, noise

# diffusers' converter leaves the connectors to a script of its own, and forgets what 2.3 has more
SOURCE = Source(("LTX-2", "LTX-2.3"), "convert_ltx2_transformer_to_diffusers", by_hand=(
    (r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln."),
    (r"^(video|audio)_embeddings_connector\.", r"\1_connector."),
    (r"\.transformer_1d_blocks\.", ".transformer_blocks."), (r"\.([qk])_norm\.", r".norm_\1.")),
    apart=("video_connector.", "audio_connector."))
VIDEO, SOUND = (1, 128, 2, 4, 3), (1, 8, 5, 16)  # [B, C, F, H, W] and [B, C, T, frequencies]
CONNECTORS = {"_class_name": "LTX2TextConnectors", "caption_channels": 32, "text_proj_in_factor": 2,
              "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 16,
              "video_connector_num_layers": 1, "audio_connector_num_attention_heads": 2,
              "audio_connector_attention_head_dim": 16, "audio_connector_num_layers": 1, "rope_type": "split"}
CONFIG = {"num_attention_heads": 32, "attention_head_dim": 4, "cross_attention_dim": 128, "audio_num_attention_heads": 32,
          "audio_attention_head_dim": 2, "audio_cross_attention_dim": 64, "num_layers": 2, "caption_channels": 96,
          "rope_type": "split"}


def forward(net, x, video_text, audio_text):
    video, sound = x[..., :3072].reshape(VIDEO), x[..., 3072:].reshape(SOUND)
    out, heard = net(video.flatten(2).transpose(1, 2), sound.transpose(1, 2).flatten(2), video_text, audio_text,
                     SIGMA * 1000, sigma=SIGMA * 1000, num_frames=2, height=4, width=3, audio_num_frames=5, fps=25,
                     return_dict=False)
    out = out.transpose(1, 2).reshape(VIDEO)
    heard = heard.unflatten(2, (8, 16)).transpose(1, 2)
    return torch.cat([out.reshape(1, 1, -1), heard.reshape(1, 1, -1)], -1)


def conds(x, video_text, audio_text):
    return {"c_crossattn": torch.cat([video_text, audio_text], -1), "attention_mask": None, "frame_rate": 25,
            "latent_shapes": [VIDEO, SOUND]}


LORA = ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_out.0")
CASES = (
    Case(CONFIG, "LTX-2", forward, lambda: (noise(1, 1, 3712), noise(1, 7, 96), noise(1, 7, 96, seed=5)), conds, LORA,
         maps=False, companions={"connectors": CONNECTORS}),
    Case({**CONFIG, "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
          "use_prompt_embeddings": False}, "LTX-2.3", forward,
         lambda: (noise(1, 1, 3712), noise(1, 7, 128), noise(1, 7, 64)), conds, LORA, maps=False,
         companions={"connectors": {**CONNECTORS, "video_gated_attn": True, "audio_gated_attn": True}}),
)

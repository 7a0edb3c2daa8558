"""Models for sound and for 3D, and SeedVR2, which restores videos.

`BESIDE` is what the host takes from a model's file for what is around the network: name -> {stored name: shape}.
`SMALLER` are classes whose sizes are numbers in the host's source: name -> {class below comfy.ldm: {number: what it is
in the tiny model}}.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

MODELS: dict[str, tuple[Any, ...]] = {
    "Stable Audio Open": ("audio.dit.AudioDiffusionTransformer", {
        "audio_model": "dit1.0", "global_cond_dim": 1536, "project_cond_tokens": False, "embed_dim": 96,
        "timestep_features_type": "learned", "io_channels": 64, "input_concat_dim": 0, "depth": 1}),
    "Stable Audio 3": ("audio.dit.AudioDiffusionTransformer", {
        "audio_model": "dit1.0", "global_cond_dim": 768, "project_cond_tokens": True, "embed_dim": 128,
        "num_memory_tokens": 8, "attn_kwargs": {"qk_norm": "rms", "differential": True}, "norm_type": "rms_norm",
        "num_heads": 4, "timestep_features_type": "expo", "io_channels": 32, "input_concat_dim": 0,
        "local_add_cond_dim": 33, "global_cond_shared_embed": True, "global_cond_type": "adaLN", "depth": 2}),
    "Hunyuan3D 2 mini": ("hunyuan3d.model.Hunyuan3Dv2", {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 96, "hidden_size": 64, "mlp_ratio": 4.0,
        "num_heads": 16, "depth": 8, "depth_single_blocks": 1, "qkv_bias": True, "guidance_embed": True}),
    "Hunyuan3D 2": ("hunyuan3d.model.Hunyuan3Dv2", {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 96, "hidden_size": 128, "mlp_ratio": 4.0,
        "num_heads": 16, "depth": 1, "depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": False}),
    "Hunyuan3D 2.1": ("hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain", {
        "image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 1024, "hidden_size": 64, "mlp_ratio": 4.0,
        "num_heads": 16, "depth": 3, "qkv_bias": False, "guidance_cond_proj_dim": None}),
    "TripoSplat": ("triposplat.model.LatentSeqMMFlowModel", {
        "image_model": "triposplat", "q_token_length": 64, "model_channels": 128, "cond_channels": 96,
        "num_blocks": 2, "num_refiner_blocks": 1}),
    "SeedVR2 3B": ("seedvr.model.NaDiT", {
        "image_model": "seedvr2", "vid_dim": 128, "heads": 2, "head_dim": 64, "txt_in_dim": 64, "num_layers": 4,
        "mm_layers": 2, "norm_eps": 1e-05, "mlp_type": "swiglu", "vid_out_norm": True}),
    "SeedVR2 7B": ("seedvr.model.NaDiT", {
        "image_model": "seedvr2", "vid_dim": 128, "heads": 2, "head_dim": 64, "txt_in_dim": 64, "num_layers": 2,
        "mm_layers": 2, "norm_eps": 1e-05, "rope_type": "rope3d", "rope_dim": 64, "mlp_type": "normal"}),
    "ACE-Step": ("ace.model.ACEStepTransformer2DModel", {
        "audio_model": "ace", "attention_head_dim": 64, "in_channels": 8, "inner_dim": 128, "max_height": 16,
        "max_position": 64, "max_width": 64, "mlp_ratio": 2.5, "num_attention_heads": 2, "num_layers": 2,
        "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 64,
        "text_embedding_dim": 96, "ssl_encoder_depths": [8, 8], "ssl_names": ["mert", "m-hubert"],
        "ssl_latent_dims": [64, 32], "lyric_encoder_vocab_size": 67, "lyric_hidden_size": 64}),
    "ACE-Step 1.5": ("ace.ace_step15.AceStepConditionGenerationModel", {
        "audio_model": "ace1.5", "hidden_size": 64, "intermediate_size": 96, "num_heads": 1, "encoder_hidden_size": 32,
        "encoder_num_heads": 1, "encoder_intermediate_size": 64, "num_dit_layers": 2}),
}
FIXED = frozenset({"TripoSplat", "SeedVR2 3B", "SeedVR2 7B", "ACE-Step"})
BESIDE = {
    "Stable Audio Open": {
        f"conditioner.conditioners.{what}.embedder.embedding.{leaf}": shape
        for what in ("seconds_start", "seconds_total")
        for leaf, shape in {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items()},
    "Stable Audio 3": {
        "conditioner.conditioners.prompt.padding_embedding": (768,),
        "conditioner.conditioners.seconds_total.embedder.embedding.1.weight": (768, 256),
        "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": (768,)},
}
SMALLER = {
    "Hunyuan3D 2.1": {"hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain": {6: 2, 8: 3}},  # blocks of experts, and these
    "ACE-Step": {"ace.model.LyricEncoder": {1024: 64, 4096: 128, 16: 2, 6: 1}},
    "ACE-Step 1.5": {"ace.ace_step15.AceStepConditionGenerationModel": {8: 2, 4: 1},  # layers, heads and levels
                     "ace.ace_step15.RotaryEmbedding": {32768: 64}},
}
if find_spec("comfy.ldm.minimax_music"):
    MODELS["MiniMax Music 3"] = ("minimax_music.dit.MiniMaxMusic3DiT", {"audio_model": "minimax_music3"})
    widths = {2304: 160, 2048: 64, 4096: 96, 8192: 128, 36: 2}
    SMALLER["MiniMax Music 3"] = {f"minimax_music.dit.{kind}": widths for kind in (
        "ContinuousTransformer", "DiffusionTransformer", "MiniMaxMusic3DiT")}
if find_spec("comfy.ldm.trellis2"):
    MODELS |= {
        "TRELLIS.2": ("trellis2.model.Trellis2", {
            "image_model": "trellis2", "resolution": 64, "init_txt_model": True, "txt_only": False,
            "model_channels": 64, "cond_channels": 96, "num_blocks": 1, "num_heads": 2, "mlp_ratio": 2}),
        "Pixal3D": ("trellis2.model.Trellis2", {
            "image_model": "trellis2", "resolution": 64, "init_txt_model": False, "txt_only": False,
            "model_channels": 64, "cond_channels": 96, "num_blocks": 1, "num_heads": 2, "mlp_ratio": 2,
            **{f"image_attn_mode_{part}": "proj" for part in ("shape", "structure")},
            **{f"proj_in_channels_{part}": 96 for part in ("shape", "structure")}}),
    }
    FIXED |= {"TRELLIS.2", "Pixal3D"}

"""Models for pictures, those of images_videos.py apart."""

from __future__ import annotations

import re
from typing import Any

import torch

MODELS: dict[str, tuple[Any, ...]] = {
    "SD3 M": ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels":
        32, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features":
        128}}, "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": []}),
    "SD3 with a context processor": ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels":
        32, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features":
        128}}, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms", "pos_embed_scaling_factor": None,
        "context_processor_layers": 1, "context_size": 64, "x_block_self_attn_layers": []}),
    "PixArt-Alpha": ("pixart.pixartms.PixArtMS", {
        "image_model": "pixart_alpha", "num_heads": 2, "patch_size": 2, "hidden_size": 96, "in_channels": 4,
        "depth": 2, "caption_channels": 64, "micro_condition": True, "model_max_length": 8, "input_size": 64,
        "pe_interpolation": 1}),
    "Hunyuan-DiT 1.1": ("hydit.models.HunYuanDiT", {
        "image_model": "hydit1", "depth": 4, "hidden_size": 64, "num_heads": 2, "text_states_dim": 64,
        "text_states_dim_t5": 64, "text_len": 7, "text_len_t5": 5, "size_cond": True, "use_style_cond": True}),
    "FLUX.1 dev": ("flux.model.Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16,
        56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}),
    "FLUX.2": ("flux.model.Flux", {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 3.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [32,
        32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True, "txt_ids_dims": [3],
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0}),
    "Z-Image in pixels": ("lumina.model.NextDiTPixelSpace", {
        "image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3, "dim": 96, "cap_feat_dim": 64, "n_layers":
        2, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 16, 16], "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32, "decoder_in_channels": 48, "decoder_hidden_size": 64, "decoder_num_res_blocks": 2,
        "decoder_max_freqs": 4, "use_x0": True}),
    "PiD": ("pixeldit.pid.PidNet", {
        "image_model": "pid", "lq_hidden_dim": 32, "lq_num_res_blocks": 1, "lq_interval": 1, "lq_latent_channels":
        16, "latent_spatial_down_factor": 8, "num_groups": 2, "hidden_size": 64, "pixel_attn_hidden_size": 32,
        "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 1, "patch_size": 4, "txt_embed_dim": 96,
        "txt_max_length": 8}),
    "PixelDiT": ("pixeldit.model.PixDiT_T2I", {
        "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_attn_hidden_size": 32,
        "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 2, "patch_size": 4, "txt_embed_dim": 96,
        "txt_max_length": 8}),
    "Chroma Radiance": ("chroma_radiance.model.ChromaRadiance", {
        "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "context_in_dim": 64, "hidden_size":
        128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56],
        "theta": 10000, "patch_size": 4, "qkv_bias": True, "in_dim": 64, "out_dim": 128, "hidden_dim": 96,
        "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None, "nerf_hidden_size": 16, "nerf_mlp_ratio": 4,
        "nerf_depth": 2, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
        "nerf_embedder_dtype": torch.float32, "use_x0": True, "use_sequential_txt_ids": True}),
    "OmniGen2": ("omnigen.omnigen2.OmniGen2Transformer2DModel", {
        "image_model": "omnigen2", "axes_dim_rope": [16, 16, 16], "axes_lens": [1024, 1664, 1664],
        "ffn_dim_multiplier": None, "hidden_size": 96, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-05,
        "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 1, "out_channels": None,
        "patch_size": 2, "text_feat_dim": 64, "timestep_scale": 1000.0}),
    "Boogu-Image": ("boogu.model.BooguTransformer2DModel", {
        "image_model": "boogu", "hidden_size": 112, "num_layers": 1, "num_double_stream_layers": 1,
        "num_refiner_layers": 1, "instruction_feat_dim": 64}),
    "Mage-Flow": ("mage_flow.model.MageFlowTransformer2DModel", {
        "image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "num_attention_heads": 1}),
    "Lens": ("lens.model.LensTransformer2DModel", {
        "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 3,
        "enc_hidden_dim": 32, "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1)}),
    "Kandinsky 5 Image": ("kandinsky5.model.Kandinsky5", {
        "image_model": "kandinsky5", "model_dim": 128, "axes_dims": (32, 48, 48), "rope_scale_factor": (1.0, 1.0,
        1.0), "time_dim": 64, "ff_dim": 256, "visual_embed_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2},
        "Kandinsky5Image"),
    "Anima": ("anima.model.Anima", {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
        "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 64, "model_channels": 128,
        "num_blocks": 2, "num_heads": 2, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "image_model": "anima", "pos_emb_learnable": True,
        "crossattn_emb_channels": 32, "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False,
        "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False}),
    "HiDream-O1": ("hidream_o1.model.HiDreamO1Transformer", {
        "image_model": "hidream_o1", "text_config_overrides": {
            "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}, "vision_config_overrides": {
            "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "depth": 2, "num_position_embeddings": 16}}),
    "Qwen-Image": ("qwen_image.model.QwenImageTransformer2DModel", {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 1,
        "joint_attention_dim": 64}),
}
FLUX = MODELS["FLUX.1 dev"]
MODELS |= {
    "FLUX.1 Fill": (FLUX[0], {**FLUX[1], "in_channels": 96}),
    "FLUX.1 schnell": (FLUX[0], {**FLUX[1], "guidance_embed": False}),
    "PiD 1.5": (MODELS["PiD"][0], {
        **MODELS["PiD"][1], "lq_latent_channels": 128, "latent_spatial_down_factor": 16, "lq_latent_unpatchify_factor":
        2, "lq_conv_padding_mode": "replicate", "lq_gate_per_token": True, "pit_lq_inject": True, "rope_ref_h": 2048,
        "rope_ref_w": 2048})}
# Parts of a model whose sizes are their own defaults, which no argument of the model's reaches.
NARROWER = {"Anima": ("anima.model.LLMAdapter", {
    "source_dim": 32, "target_dim": 32, "model_dim": 64, "num_layers": 1, "num_heads": 2})}


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One Linear modulates a pixel block, pixel by pixel; the host cuts it in two as it loads."""
    made = {key: tensor for key, tensor in tensors.items() if "_modulation_m" not in key}
    for key in (key for key in tensors if "_modulation_msa." in key):
        halves = [tensors[key.replace("_msa.", half)] for half in ("_msa.", "_mlp.")]
        pixels = [half.unflatten(0, (-1, 3, tensors[PIXEL].shape[0])) for half in halves]
        made[key.replace("_modulation_msa.", "_modulation.0.")] = torch.cat(pixels, 1).flatten(0, 2)
    return made


def below_core(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"core.{key}": tensor for key, tensor in joined(tensors).items()}


def with_mergers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision tower's mergers, which the host leaves out."""
    merger = "visual.merger."
    return tensors | {key.replace(merger, "visual.deepstack_merger_list.0."): tensor for key, tensor in tensors.items()
                      if key.startswith(merger)}


def with_positions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The host computes the positions itself, and only reads for what size of picture they are."""
    return tensors | {"pos_embed": torch.ones(1, 1024, 96)}


def with_scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of norms are called scale, which the host renames."""
    return {re.sub(r"(norm|norms\.\d+)\.weight$", r"\1.scale", key): tensor for key, tensor in tensors.items()}


# What files have that is not in the network's own names: name of the model -> the network's tensors to the file's.
PIXEL = "pixel_embedder.proj.weight"
PUBLISHED = {"PixArt-Alpha": with_positions, "PiD": joined, "PiD 1.5": joined, "PixelDiT": below_core,
             "Chroma Radiance": with_scales, "HiDream-O1": with_mergers}
FIXED = frozenset({"SD3 with a context processor", "PixArt-Alpha", "Hunyuan-DiT 1.1", "Z-Image in pixels", "PiD",
                   "PiD 1.5", "PixelDiT", "Chroma Radiance", "OmniGen2", "Mage-Flow", "Anima", "HiDream-O1",
                   "Qwen-Image", "Kandinsky 5 Image"})

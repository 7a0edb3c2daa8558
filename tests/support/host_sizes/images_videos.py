"""Models for pictures and videos, Wan's relatives apart (wan.py)."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, tuple[Any, ...]] = {
    "SD3.5 M": ("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 3, "input_size": None, "adm_in_channels":
        32, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features":
        192}}, "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms", "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [0, 1]}),
    "LTX-Video": ("lightricks.model.LTXVModel", {
        "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 4, "cross_attention_dim": 128}),
    "Krea-2": ("krea2.model.SingleStreamDiT", {
        "image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
        "txtlayers": 3, "txtdim": 160}),
    "Wan VACE": ("wan.model.VaceWanModel", {
        "image_model": "wan2.1", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "patch_size": [1, 2, 2],
        "freq_dim": 256, "window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True, "eps": 1e-06, "in_dim":
        16, "num_layers": 4, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 2}),
    "Wan Animate": ("wan.model_animate.AnimateWanModel", {
        "image_model": "wan2.1", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "patch_size": [1, 2, 2],
        "freq_dim": 256, "window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True, "eps": 1e-06, "in_dim":
        36, "num_layers": 5, "model_type": "animate"}),
    "MiniMax-H3": ("minimax.model.MiniMaxH3Model", {
        "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 128, "ffn_hidden_size": 256, "latents_dim": 24,
        "audio_latents_dim": 32, "text_dim": 64, "timestep_input_dim": 64, "time_embed_hidden_size": 96,
        "time_embed_dim": 64, "rope_inv_freq_len": 16}),
    "HunyuanVideo 1.5": ("hunyuan_video.model.HunyuanVideo", {
        "image_model": "hunyuan_video", "in_channels": 65, "patch_size": [1, 1, 1], "out_channels": 32,
        "vec_in_dim": None, "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 64, "hidden_size": 128,
        "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 0, "theta": 256, "qkv_bias": True,
        "byt5": True, "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 1152,
        "meanflow_sum": True}),
    "HunyuanImage 2.1 distilled": ("hunyuan_video.model.HunyuanVideo", {
        "image_model": "hunyuan_video", "in_channels": 64, "patch_size": [1, 1], "out_channels": 64, "vec_in_dim":
        None, "axes_dim": [64, 64], "meanflow": True, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0,
        "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": True,
        "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}),
    "Kandinsky 5": ("kandinsky5.model.Kandinsky5", {
        "image_model": "kandinsky5", "in_text_dim": 3584, "in_text_dim2": 768, "time_dim": 64, "model_dim": 128,
        "ff_dim": 256, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": [16, 24, 24], "visual_embed_dim":
        132}),
    "Ovis-Image": ("flux.model.Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": None, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16,
        56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [1, 2],
        "yak_mlp": True, "txt_norm": True}),
    "LongCat-Image": ("flux.model.Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": None, "context_in_dim": 3584,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16,
        56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [1, 2]}),
    "CogVideoX": ("cogvideo.model.CogVideoXTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "time_embed_dim":
        64, "text_embed_dim": 64, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 7, "use_rotary_positional_embeddings": True}),
    "JoyAI-Image": ("joyimage.model.JoyImageTransformer3DModel", {
        "hidden_size": 128, "num_attention_heads": 1, "text_dim": 4096, "num_layers": 2, "theta": 10000}),
    "LTX-2": ("lightricks.av_model.LTXAVModel", {
        "image_model": "ltxav", "num_layers": 2, "attention_head_dim": 4, "cross_attention_dim": 128,
        "audio_attention_head_dim": 2, "audio_cross_attention_dim": 64, "caption_channels": 96, "rope_type": "split",
        "frequencies_precision": "float64", "causal_temporal_positioning": True, "use_middle_indices_grid": True,
        "av_ca_timestep_scale_multiplier": 1000, "connector_attention_head_dim": 16,
        "connector_num_attention_heads": 2, "connector_num_layers": 1}),
    "Chroma": ("chroma.model.Chroma", {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 128,
        "mlp_ratio": 4.0, "num_heads": 1, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta":
        10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 128, "hidden_dim": 96, "n_layers": 2,
        "txt_ids_dims": [], "vec_in_dim": None}),
    "AuraFlow": ("aura.mmdit.MMDiT", {
        "max_seq": 64, "cond_seq_dim": 2048, "n_double_layers": 2, "n_layers": 4, "dim": 128, "n_heads": 4,
        "global_conddim": 128}),
    "Lumina 2": ("lumina.model.NextDiT", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 64, "n_layers": 2,
        "qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0}),
    "Cosmos 1": ("cosmos.model.GeneralDIT", {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
        "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 256, "model_channels": 128,
        "num_blocks": 2, "num_heads": 2, "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0,
        "rope_t_extrapolation_ratio": 2.0, "image_model": "cosmos", "pos_emb_learnable": False, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
        "extra_per_block_abs_pos_emb_type": "learnable"}),
    "Cosmos Predict 2": ("cosmos.predict2.MiniTrainDIT", {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
        "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 256, "model_channels": 128,
        "num_blocks": 2, "num_heads": 2, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "image_model": "cosmos_predict2", "pos_emb_learnable": True,
        "crossattn_emb_channels": 1024, "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False,
        "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False}),
    "ERNIE-Image": ("ernie.model.ErnieImageModel", {
        "image_model": "ernie", "hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size":
        384, "text_in_dim": 64}),
    "HiDream-I1": ("hidream.model.HiDreamImageTransformer2DModel", {
        "image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels":
        [64, 64], "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1, 1], "num_attention_heads":
        1, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 2,
        "out_channels": 16, "patch_size": 2, "text_emb_dim": 32}),
    "PixArt-Sigma": ("pixart.pixartms.PixArtMS", {
        "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4,
        "depth": 2, "caption_channels": 64, "micro_condition": False, "model_max_length": 8, "input_size": 64,
        "pe_interpolation": 1}),
    "Hunyuan-DiT": ("hydit.models.HunYuanDiT", {
        "image_model": "hydit", "depth": 4, "hidden_size": 64, "num_heads": 2, "text_states_dim": 64,
        "text_states_dim_t5": 64, "text_len": 7, "text_len_t5": 5}),
    "Ideogram 4": ("ideogram4.model.Ideogram4Transformer2DModel", {
        "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 1,
        "attention_head_dim": 256, "intermediate_size": 256, "adaln_dim": 64, "llm_features_dim": 96, "rope_theta":
        5000000, "mrope_section": [24, 20, 20], "norm_eps": 1e-05}),
    "Qwen-Image-Layered": ("qwen_image.model.QwenImageTransformer2DModel", {
        "in_channels": 64, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64,
        "use_additional_t_cond": True, "default_ref_method": "negative_index", "image_model": "qwen_image"}),
}
MODELS["LTX-2.3"] = (MODELS["LTX-2"][0], {
    **MODELS["LTX-2"][1], "apply_gated_attention": True, "cross_attention_adaln": True,
    "caption_proj_before_connector": True, "caption_projection_first_linear": False,
    "connector_apply_gated_attention": True})
FIXED = frozenset({"Chroma", "AuraFlow", "Lumina 2", "Cosmos 1", "Cosmos Predict 2", "ERNIE-Image", "HiDream-I1",
                   "PixArt-Sigma", "Hunyuan-DiT", "Ideogram 4", "Qwen-Image-Layered"})
SMALLER = {"Wan Animate": {  # of whatever width the transformer is, it has 40 million numbers for faces
    "wan.model_animate.EncoderApp": {512: 32, 256: 16, 128: 8, 64: 8, 32: 8},
    "wan.model_animate.Direction": {512: 32}, "wan.model_animate.FaceEncoder": {1024: 32},
    "wan.model_animate.AnimateWanModel": {512: 32},
}}

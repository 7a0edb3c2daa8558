"""Models for videos: Wan's relatives, HunyuanVideo's, Mochi, CogVideoX and Cosmos with a picture."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

WAN = {"image_model": "wan2.1", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "patch_size": [1, 2, 2],
       "freq_dim": 256, "window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True, "eps": 1e-06,
       "num_layers": 2}
HUNYUAN = {"image_model": "hunyuan_video", "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 768, "axes_dim":
           [16, 56, 56], "meanflow": False, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1,
           "depth": 1, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": False, "guidance_embed": True,
           "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 17, "out_channels": 16,
          "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
          "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 256, "model_channels": 128,
          "num_blocks": 2, "num_heads": 2}
COGVIDEO = {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "out_channels": 16,
            "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2}

MODELS: dict[str, tuple[Any, ...]] = {
    "Wan 2.2 5B": ("wan.model.WanModel", {**WAN, "model_type": "t2v", "in_dim": 48, "out_dim": 48}),
    "Wan 2.1 causal": ("wan.ar_model.CausalWanModel", {**WAN, "model_type": "t2v", "in_dim": 16}),
    "Wan 2.1 T2V": ("wan.model.WanModel", {**WAN, "model_type": "t2v", "in_dim": 16}),
    "Wan 2.1 I2V": ("wan.model.WanModel", {**WAN, "model_type": "i2v", "in_dim": 36}),
    "Wan 2.1 Fun Control": ("wan.model.WanModel", {**WAN, "model_type": "i2v", "in_dim": 48}),
    "Wan 2.1 Fun Control with a reference": ("wan.model.WanModel", {
        **WAN, "model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}),
    "Wan 2.1 Fun Camera": ("wan.model.CameraWanModel", {**WAN, "model_type": "camera", "in_dim": 32}),
    "Wan 2.2 Fun Camera": ("wan.model.CameraWanModel", {**WAN, "model_type": "camera_2.2", "in_dim": 36}),
    "Wan 2.2 S2V": ("wan.model.WanModel_S2V", {**WAN, "model_type": "s2v", "in_dim": 16}),
    "HuMo": ("wan.model.HumoWanModel", {**WAN, "model_type": "humo", "in_dim": 36}),
    "FlowRVS": ("wan.model.WanModel", {**WAN, "model_type": "t2v", "in_dim": 16}),
    "SCAIL": ("wan.model.SCAILWanModel", {**WAN, "model_type": "scail", "in_dim": 20}),
    "SCAIL-2": ("wan.model.SCAIL2WanModel", {**WAN, "model_type": "scail2", "in_dim": 20}),
    "WanDancer": ("wan.model_wandancer.WanDancerModel", {**WAN, "model_type": "wandancer", "in_dim": 36}),
    "HunyuanVideo 1.5 SR": ("hunyuan_video.model.HunyuanVideo", {
        **HUNYUAN, "in_channels": 98, "patch_size": [1, 1, 1], "out_channels": 32, "vec_in_dim": None, "depth": 2,
        "depth_single_blocks": 0, "byt5": True, "guidance_embed": False, "use_cond_type_embedding": True,
        "vision_in_dim": 1152, "meanflow_sum": True}),
    "HunyuanImage 2.1 refiner": ("hunyuan_video.model.HunyuanVideo", {
        **HUNYUAN, "in_channels": 128, "patch_size": [1, 1, 1], "out_channels": 64, "vec_in_dim": None}),
    "HunyuanVideo SkyReels I2V": ("hunyuan_video.model.HunyuanVideo", {**HUNYUAN, "in_channels": 32}),
    "HunyuanVideo I2V": ("hunyuan_video.model.HunyuanVideo", {**HUNYUAN, "in_channels": 33}),
    "HunyuanVideo": ("hunyuan_video.model.HunyuanVideo", {**HUNYUAN, "in_channels": 16}),
    "Mochi 1": ("genmo.joint_model.asymm_models_joint.AsymmDiTJoint", {
        "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 96,
        "hidden_size_y": 96, "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12,
        "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
        "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
        "use_t5": True, "t5_feat_dim": 128, "t5_token_length": 8, "rope_theta": 10000.0}),
    "CogVideoX-Fun Inpaint": ("cogvideo.model.CogVideoXTransformer3DModel", {
        **COGVIDEO, "in_channels": 48, "patch_size": 2, "use_rotary_positional_embeddings": True}),
    "CogVideoX 1.5": ("cogvideo.model.CogVideoXTransformer3DModel", {
        **COGVIDEO, "in_channels": 16, "patch_size": 2, "patch_size_t": 2, "use_rotary_positional_embeddings": True}),
    "CogVideoX-Fun 1.5 Inpaint": ("cogvideo.model.CogVideoXTransformer3DModel", {
        **COGVIDEO, "in_channels": 48, "patch_size": 2, "patch_size_t": 2, "use_rotary_positional_embeddings": True}),
    "CogVideoX 1.5 I2V": ("cogvideo.model.CogVideoXTransformer3DModel", {
        **COGVIDEO, "in_channels": 32, "patch_size": 2, "patch_size_t": 2, "ofs_embed_dim": 64,
        "use_rotary_positional_embeddings": True}),
    "CogVideoX I2V, learned positions": ("cogvideo.model.CogVideoXTransformer3DModel", {
        **COGVIDEO, "num_attention_heads": 3, "in_channels": 32, "patch_size": 2,
        "use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": False, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 7}),
    "Cosmos 1 I2V": ("cosmos.model.GeneralDIT", {
        **COSMOS, "image_model": "cosmos", "pos_emb_learnable": False, "block_config": "FA-CA-MLP", "block_x_format":
        "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True, "rope_h_extrapolation_ratio": 1.0,
        "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 2.0, "extra_per_block_abs_pos_emb_type":
        "learnable"}),
    "Cosmos Predict 2 I2V": ("cosmos.predict2.MiniTrainDIT", {
        **COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True, "crossattn_emb_channels": 1024,
        "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 3.0,
        "rope_w_extrapolation_ratio": 3.0, "rope_t_extrapolation_ratio": 1.0, "extra_h_extrapolation_ratio": 1.0,
        "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False}),
}
# Models that only the header of a file tells from another of the same names and sizes.
HEADERS = {"Wan 2.1 causal": {"causal_ar": True}, "FlowRVS": {"model_type": "flow_rvs"}}
if find_spec("comfy.ldm.wan.model_animate2"):  # ComfyUI 0.33 and later
    MODELS["Wan Animate 2"] = ("wan.model_animate2.WanAnimate2Model", {**WAN, "model_type": "animate2", "in_dim": 36})
    HEADERS["Wan Animate 2"] = {"model_type": "animate2"}
# The host's code has their sizes as constants, and detection does not look: 50 MB of numbers.
NARROWER = {"HuMo": ("wan.model.AudioProjModel", {"channels": 16, "intermediate_dim": 64}),
           "HunyuanVideo 1.5 SR": ("hunyuan_video.model.ByT5Mapper", {"out_dim": 64, "hidden_dim": 64})}
FIXED = frozenset({"Mochi 1", "CogVideoX I2V, learned positions", "Cosmos 1 I2V", "Cosmos Predict 2 I2V"})
SMALLER = {"Mochi 1": {"genmo.joint_model.asymm_models_joint.AsymmetricJointBlock": {1536: 48}}}  # of half the width

"""Stable Video Diffusion (comfy/ldm/modules/diffusionmodules/openaimodel.py), which ComfyUI knows by its sizes."""

from __future__ import annotations

from ..derived import Derived

DOWN, UP = "CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"
CLASS = Derived(
    title="Stable Video Diffusion", hosts=("SVD_img2vid",), table="svd", classes=("UNetSpatioTemporalConditionModel",),
    marks=("temporal_transformer_blocks.0.norm_in.", "down_blocks.0.resnets.0.spatial_res_block."),
    fixed={
        "in_channels": (8,), "out_channels": (4,), "block_out_channels": ((320, 640, 1280, 1280),),
        "num_attention_heads": ((5, 10, 20, 20),), "cross_attention_dim": (1024,), "layers_per_block": (2,),
        "transformer_layers_per_block": (1,), "addition_time_embed_dim": (256,),
        "projection_class_embeddings_input_dim": (768,),
        "down_block_types": ((DOWN, DOWN, DOWN, "DownBlockSpatioTemporal"),),
        "up_block_types": (("UpBlockSpatioTemporal", UP, UP, UP),),
    },
    free=frozenset({"sample_size", "num_frames"}),
)

"""UNets and Stable Cascade. The host's detection reads all sizes of a UNet, but knows each class by its published ones;
those of Stable Cascade are in its code.
"""

from __future__ import annotations

from typing import Any

UNET = {"use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
        "out_channels": 4, "use_temporal_resblock": False, "use_temporal_attention": False, "adm_in_channels": None}
# Where the transformers are: about as published, less often and less deep; one in the middle unless told otherwise.
SD1 = {"num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 2], "transformer_depth": [1, 1, 0],
       "transformer_depth_output": [1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1}
SD2 = {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 1, 1, 1], "transformer_depth": [1, 1, 0, 0, 0, 0, 0, 0],
       "transformer_depth_output": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], "transformer_depth_middle": 1}
XL = {"num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 2], "transformer_depth": [0, 1, 2],
      "transformer_depth_output": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2}
VIDEO = {"num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 0],
         "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1, "in_channels": 8,
         "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
         "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "use_temporal_resblock": True,
         "use_temporal_attention": True, "disable_temporal_crossattention": False}
# Of Stable Video Diffusion as many as published: diffusers counts them by level, the host in one row.
LEVELS = {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
          "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}


def unet(kind: str, where: dict[str, Any], width: int, context: int, vector: int | None = None, linear: bool = True,
         heads: int = -1, **more: Any) -> tuple[Any, ...]:
    """A UNet of this class of the host's. `vector` is what label_emb reads; heads without number have 64 channels."""
    classes = {"num_classes": "sequential", "adm_in_channels": vector} if vector else {}
    return "modules.diffusionmodules.openaimodel.UNetModel", {
        **UNET, **where, "model_channels": width, "context_dim": context, "use_linear_in_transformer": linear,
        "num_heads": heads, "num_head_channels": 64 if heads < 0 else -1, **classes, **more}, kind


MODELS: dict[str, tuple[Any, ...]] = {
    "SD 1.5": unet("SD15", SD1, 32, 96, linear=False, heads=8),
    "InstructPix2Pix": unet("SD15_instructpix2pix", SD1, 32, 96, linear=False, heads=8, in_channels=8),
    "Stable Zero123": unet("Stable_Zero123", SD1, 32, 96, linear=False, heads=8, in_channels=8),
    "SD 2": unet("SD20", SD2, 64, 96),
    "SD 2.1 unCLIP L": unet("SD21UnclipL", SD2, 64, 96, 192),
    "SD 2.1 unCLIP H": unet("SD21UnclipH", SD2, 64, 96, 256),
    "Lotus D": unet("LotusD", SD2, 64, 96, 4),
    "SD x4 upscaler": unet("SD_X4Upscaler", SD2, 64, 96, heads=8, in_channels=7, num_classes=1000, transformer_depth=
                           [0, 1, 0, 0, 0, 0, 1, 0], disable_self_attentions=[True, True, True, False],
                           transformer_depth_output=[0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
    "SDXL": unet("SDXL", XL, 32, 128, 160),
    "SDXL InstructPix2Pix": unet("SDXL_instructpix2pix", XL, 32, 128, 160, in_channels=8),
    "SDXL Refiner": unet("SDXLRefiner", XL, 32, 96, 160, num_res_blocks=[1, 1, 1, 1], channel_mult=[1, 2, 2, 2],
                         transformer_depth=[0, 1, 1, 0], transformer_depth_output=[0, 0, 1, 1, 1, 1, 0, 0]),
    "SSD-1B": unet("SSD1B", XL, 32, 128, 160, transformer_depth_output=[0, 0, 1, 2, 3, 2], transformer_depth_middle=-1),
    "Segmind Vega": unet("Segmind_Vega", XL, 32, 128, 160, transformer_depth_middle=-1),
    "KOALA 700M": unet("KOALA_700M", XL, 32, 128, 160, transformer_depth_middle=-2),
    "KOALA 1B": unet("KOALA_1B", XL, 32, 128, 160),
    "Stable Video Diffusion": unet("SVD_img2vid", {**VIDEO, **LEVELS}, 64, 96, 192),
    "SV3D u": unet("SV3D_u", VIDEO, 64, 96, 64),
    "SV3D p": unet("SV3D_p", VIDEO, 64, 96, 320),
    "Stable Cascade C": ("cascade.stage_c.StageC", {
        "stable_cascade_stage": "c", "c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]],
        "c_clip_text": 96, "c_clip_text_pooled": 96, "c_clip_img": 128}),
    "Stable Cascade B": ("cascade.stage_b.StageB", {
        "stable_cascade_stage": "b", "c_cond": 64, "c_hidden": [32, 64, 64, 64], "nhead": [-1, -1, 2, 2], "blocks":
        [[1, 1, 2, 1], [1, 2, 1, 1]], "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]], "c_clip": 96}),
}
FIXED = frozenset({"Stable Cascade C", "Stable Cascade B"})
BESIDE = {"Stable Zero123": {"cc_projection.weight": (96, 100), "cc_projection.bias": (96,)}}

"""Names for what this pack meets but does not load, so that a refusal can say what the file is."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from ...host.texts import Text


class _Mark(NamedTuple):
    pattern: str
    what: str
    do: str


_MODEL = Text("load it with another loader, or use a version of this pack that lists it")
_MARKS = [_Mark(pattern, what, do) for pattern, what, do in (
    (r"(\.lora_[AB]\.|\.lora_(up|down)\.|\.lokr_|\.hada_)", Text("a LoRA"),
     Text("load it with a LoRA node, on the MODEL this node gives")),
    (r"^(controlnet_x_embedder|controlnet_blocks|control_model)\b", Text("a ControlNet"),
     Text("load it with Load ControlNet Model")),
    (r"(^|\.)text_model\.encoder\.layers\.|(^|\.)encoder\.block\.\d+\.layer\.|^(model\.)?(language_model\.)?"
     r"(model\.)?layers\.\d+\.(self_attn|mlp)\.", Text("a text encoder"),
     Text("give it to Load Base Text Encoder as override, or to a CLIP loader")),
    (r"^(enc\.)?blk\.\d+\.|^v\.blk\.\d+\.", Text("a text encoder (or the eyes of one) in GGUF"),
     Text("give it to Load Base Text Encoder as override")),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down_blocks|up_blocks|mid_block|mid\.block_1)\b",
     Text("a VAE"), Text("load it with Load VAE")),
    (r"^(model\.diffusion_model\.)?(input_blocks|output_blocks|middle_block)\.|^down_blocks\.\d+\.attentions",
     Text("an incomplete or modified Stable Diffusion UNet"), _MODEL),
    (r"(^|\.)video_patch_proj\.", "MiniMax-H3", _MODEL),
    (r"(^|\.)audio_(adaln_single|patchify_proj)\.", "LTX-2", _MODEL),
    (r"(^|\.)patchify_proj\.", "LTX-Video", _MODEL),
    (r"distilled_guidance_layer", "Chroma", _MODEL),
    (r"double_stream_modulation_img", Text("an incomplete or modified FLUX.2"), _MODEL),
    (r"cond_type_embed|(^|\.)vision_in\.|byt5_in\.|context_embedder_2\.", Text("HunyuanVideo 1.5 or HunyuanImage"),
     _MODEL),
    (r"token_refiner", Text("an incomplete or modified HunyuanVideo"), _MODEL),
    (r"^(model\.diffusion_model\.)?(cap_embedder|noise_refiner)\.", Text("Lumina 2 or an incomplete Z-Image"), _MODEL),
    (r"\.(qkv_proj|qweight|wscales)\b", Text("a Nunchaku SVDQuant transformer"), _MODEL),
    (r"^(model\.diffusion_model\.)?vace_(blocks|patch_embedding)\.", "Wan VACE", _MODEL),
    (r"^(model\.diffusion_model\.)?control_adapter\.", Text("Wan with camera control"), _MODEL),
    (r"casual_audio_encoder\.", "Wan S2V", _MODEL),
    (r"^(model\.diffusion_model\.)?audio_proj\.", "HuMo", _MODEL),
    (r"(^|\.)(face_adapter|motion_encoder)\.", "Wan Animate", _MODEL),
    (r"patch_embedding_(pose|mask)\.", "SCAIL", _MODEL),
    (r"patch_embedding_global\.", "WanDancer", _MODEL),
    (r"^(model\.diffusion_model\.)?ref_conv\.", Text("Wan Fun with a reference"), _MODEL),
    (r"fps_embedding\.", "SkyReels-V2", _MODEL),
    (r"^(condition_embedder\.|patch_embedding\.|(model\.diffusion_model\.)?blocks\.\d+\.(self_attn|cross_attn|attn1)\.)",
     Text("a model built around Wan"), _MODEL),
    (r"^(model\.diffusion_model\.)?transformer_blocks\.\d+\.(img_mod|txt_mod)\.",
     Text("an incomplete or modified Qwen-Image"), _MODEL),
    (r"^(model\.diffusion_model\.)?joint_blocks\.|^pos_embed\.proj\.", "Stable Diffusion 3", _MODEL),
)]


def name_other(names: Collection[str]) -> tuple[str, str]:
    """What an unrecognised set of tensor names most likely is, and what to do with it."""
    for pattern, what, do in _MARKS:
        found = re.compile(pattern)
        if any(found.search(name) for name in names):
            return what, do
    return Text("an unknown kind of model"), Text("pick the folder or file of a diffusion transformer")

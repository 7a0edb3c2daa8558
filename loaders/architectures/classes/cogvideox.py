"""CogVideoX 1.5: from text, from a picture, and Fun's for inpainting (comfy/ldm/cogvideo/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

CHANNELS = {16: "CogVideoX_T2V", 32: "CogVideoX_I2V", 48: "CogVideoX_Inpaint"}


def _before(sizes: Mapping[str, Any]) -> str:
    """Those before 1.5 have patches of one frame. ComfyUI multiplies the rotary positions of theirs by 1.875, gives
    rotary positions to those that have others (2B), and none to those that have both (5B-I2V)."""
    if not sizes.get("patch_size_t"):
        return Text("ComfyUI does not run a CogVideoX before 1.5 as diffusers does: it scales its rotary positions, or "
                    "has none")
    if sizes["in_channels"] not in CHANNELS:
        return Text("ComfyUI runs CogVideoX with {known} channels in only, but this one has {channels}",
                    known=", ".join(map(str, CHANNELS)), channels=sizes["in_channels"])
    return ""


CLASS = Derived(
    title="CogVideoX", hosts=tuple(CHANNELS.values()), table="cogvideox", classes=("CogVideoXTransformer3DModel",),
    marks=("patch_embed.text_proj.", "transformer_blocks.0.norm1.linear.", "transformer_blocks.0.attn1.norm_q."),
    never=("local_facial_extractor.",),  # ConsisID
    fixed={
        "attention_head_dim": (64,), "out_channels": (16,), "patch_size": (2,), "patch_size_t": (2,),
        "use_rotary_positional_embeddings": (True,), "use_learned_positional_embeddings": (False,),
        "flip_sin_to_cos": (True,), "freq_shift": (0,), "attention_bias": (True,),
        "activation_fn": ("gelu-approximate",), "timestep_activation_fn": ("silu",),
        "norm_elementwise_affine": (True,), "norm_eps": (1e-5,),
    },
    # sizes of a video and how they are spread are of positions that 1.5 does not have; the last one is Fun's
    free=frozenset({
        "num_attention_heads", "in_channels", "time_embed_dim", "ofs_embed_dim", "text_embed_dim", "num_layers",
        "dropout", "sample_width", "sample_height", "sample_frames", "temporal_compression_ratio",
        "max_text_seq_length", "spatial_interpolation_scale", "temporal_interpolation_scale", "patch_bias",
        "add_noise_in_inpaint_model",
    }),
    wrong=_before,
)

"""HunyuanImage 2.1, its distilled model and its refiner (comfy/ldm/hunyuan_video/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

_KINDS = {  # the number of a patch's sides -> channels in, sizes of the axes
    2: (64, (64, 64)), 3: (128, (16, 56, 56))}


def _mixed(config: Mapping[str, Any]) -> str:
    """ComfyUI takes a patch in space for the model's, one in time and space for the refiner's
    (comfy/model_detection.py), which is given a picture beside the noise (comfy/model_base.py)."""
    patch, channels = tuple(config.get("patch_size") or (1, 1)), config.get("in_channels") or 64
    axes = tuple(config.get("rope_axes_dim") or (64, 64))
    if (channels, axes) == _KINDS[len(patch)]:
        return ""
    return Text("ComfyUI runs HunyuanImage 2.1 with patch_size (1, 1), in_channels 64 and rope_axes_dim (64, 64), and "
                "its refiner with (1, 1, 1), 128 and (16, 56, 56); config.json says {patch}, {channels} and {axes}",
                patch=patch, channels=channels, axes=axes)


CLASS = Derived(
    title="HunyuanImage 2.1", hosts=("HunyuanImage21", "HunyuanImage21Refiner"), table="hunyuan_image",
    classes=("HunyuanImageTransformer2DModel",),
    marks=("time_guidance_embed.timestep_embedder.", "context_embedder.token_refiner.", "single_transformer_blocks."),
    fixed={
        "attention_head_dim": (128,), "num_refiner_layers": (2,), "in_channels": (64, 128), "out_channels": (64,),
        "mlp_ratio": (4.0, 4), "patch_size": ((1, 1), (1, 1, 1)), "qk_norm": ("rms_norm",),
        "text_embed_2_dim": (1472,), "rope_theta": (256.0, 256), "rope_axes_dim": ((64, 64), (16, 56, 56)),
    },
    free=frozenset({
        "num_attention_heads", "num_layers", "num_single_layers", "guidance_embeds", "text_embed_dim", "use_meanflow",
    }),
    refuses=_mixed,
)

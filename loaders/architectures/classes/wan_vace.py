"""Wan 2.1 and 2.2 VACE (comfy/ldm/wan/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

# of every Wan (comfy/model_detection.py)
FIXED: Mapping[str, tuple[Any, ...]] = {
    "patch_size": ((1, 2, 2),), "attention_head_dim": (128,), "freq_dim": (256,), "cross_attn_norm": (True,),
    "qk_norm": ("rms_norm_across_heads",), "eps": (1e-6,),
}


def _uneven(config: Mapping[str, Any]) -> str:
    """ComfyUI places VACE's blocks evenly, by their number (comfy/ldm/wan/model.py)."""
    layers, count = config.get("vace_layers"), config.get("num_layers") or 40
    if layers and list(layers) != list(range(0, count, max(1, count // len(layers)))):
        return Text("ComfyUI runs VACE blocks beside every so many layers only; config.json has them beside {layers} "
                    "of {count}", layers=", ".join(map(str, layers)), count=count)
    return ""


CLASS = Derived(
    title="Wan VACE", hosts=("WAN21_Vace",), table="wan_vace", classes=("WanVACETransformer3DModel",),
    marks=("vace_blocks.0.proj_in.", "condition_embedder."),
    fixed=FIXED,
    free=frozenset({
        "in_channels", "out_channels", "text_dim", "ffn_dim", "num_layers", "num_attention_heads", "image_dim",
        "added_kv_proj_dim", "rope_max_seq_len", "pos_embed_seq_len", "vace_layers", "vace_in_channels",
    }),
    refuses=_uneven,
)

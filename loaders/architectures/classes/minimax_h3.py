"""MiniMax-H3: video with sound (comfy/ldm/minimax/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..derived import Derived

if TYPE_CHECKING:
    from torch import Tensor

FREQUENCIES, THETA = 16, 10000.0


def _frequencies(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What diffusers computes in F32 (MiniMaxH3RotaryPosEmbed), and ComfyUI reads of the file."""
    import torch

    return {"rope.inv_freq": 1 / THETA ** (torch.arange(FREQUENCIES, dtype=torch.float32) / FREQUENCIES)}


CLASS = Derived(
    title="MiniMax-H3", hosts=("MiniMaxH3",), table="minimax_h3", classes=("MiniMaxH3Transformer3DModel",),
    marks=("audio_proj_in.", "audio_proj_out.", "token_refiner.refiner_blocks.0.attn.to_q."),
    fixed={
        "rope_freq_dim": (FREQUENCIES,), "rope_theta": (THETA,), "patch_size": ((1, 2, 2),), "norm_eps": (1e-5,),
        "qk_norm_eps": (1e-5,), "final_norm_eps": (1e-5,),
    },
    free=frozenset({
        "num_attention_heads", "attention_head_dim", "hidden_size", "num_layers", "num_refiner_layers", "ffn_dim",
        "in_channels", "audio_in_channels", "text_dim", "freq_dim", "time_embed_hidden_dim", "time_embed_dim",
    }),
    made=_frequencies,
)

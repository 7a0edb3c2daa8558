"""Cosmos 1: Text2World and Video2World (comfy/ldm/cosmos/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

TITLE = "Cosmos 1"
ROPE = {32: (2.0, 1.0, 1.0), 40: (2.0, 2.0, 2.0)}  # of 7B and 14B (comfy/model_detection.py)
LAYERS = {32: 28, 40: 36}


def _refuses(config: Mapping[str, Any]) -> str:
    """ComfyUI reads no number of layers and no scale of positions: its code has them, by the width."""
    if "extra_pos_embed_type" in config and config["extra_pos_embed_type"] is None:
        return Text("ComfyUI runs a {model} with learnable positions only; config.json says extra_pos_embed_type null",
                    model=TITLE)
    heads = config.get("num_attention_heads") or 32
    return differs(TITLE, config, LAYERS.get(heads, 0), ROPE.get(heads, ()))


def differs(title: str, config: Mapping[str, Any], layers: int, rope: tuple[float, ...]) -> str:
    """What of the layers and the scale of positions is not what ComfyUI has for a model of this width, or empty."""
    said, scale = config.get("num_layers"), config.get("rope_scale")
    if said not in (None, layers) or (scale is not None and tuple(scale) != rope):
        return Text("ComfyUI runs a {model} of this width with {layers} layers and rope_scale {rope}; config.json says "
                    "{said} and {scale}", model=title, layers=layers, rope=list(rope), said=said, scale=scale)
    return ""


CLASS = Derived(
    title=TITLE, hosts=("CosmosT2V", "CosmosI2V"), table="cosmos1", classes=("CosmosTransformer3DModel",),
    marks=("learnable_pos_embed.pos_emb_t", "transformer_blocks.0.attn1.norm_q.", "time_embed.t_embedder.",
           "transformer_blocks.0.norm1.linear_1."),
    fixed={
        "attention_head_dim": (128,), "num_attention_heads": (32, 40), "out_channels": (16,), "in_channels": (16, 17),
        "mlp_ratio": (4.0, 4), "text_embed_dim": (1024,), "adaln_lora_dim": (256,), "patch_size": ((1, 2, 2),),
        "max_size": ((128, 240, 240),), "concat_padding_mask": (True,), "extra_pos_embed_type": ("learnable",),
        "use_crossattn_projection": (False,), "img_context_dim_in": (0,),
    },
    # the last ones are of what the model does not have, or of a ControlNet beside it
    free=frozenset({
        "num_layers", "rope_scale", "crossattn_proj_in_channels", "encoder_hidden_states_channels",
        "controlnet_block_every_n", "img_context_num_tokens", "img_context_dim_out",
    }),
    refuses=_refuses,
)

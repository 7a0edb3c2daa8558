"""Cosmos Predict 2: Text2Image and Video2World (comfy/ldm/cosmos/predict2.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived
from . import cosmos1

TITLE = "Cosmos Predict 2"
ADAPTER = "blocks.0.cross_attn.q_norm."  # of Anima's text
# (heads, input channels) -> scale of positions, of 2B and 14B (comfy/model_detection.py)
ROPE = {(16, 16): (1.0, 4.0, 4.0), (40, 16): (1.0, 4.0, 4.0), (16, 17): (1.0, 3.0, 3.0), (40, 17): (20 / 24, 2.0, 2.0)}
LAYERS = {16: 28, 40: 36}


def _refuses(config: Mapping[str, Any]) -> str:
    if config.get("_text_conditioner") is not None:
        return Text("with {part} beside it this is no {model}", part="text_conditioner", model=TITLE)
    return unlike(config)


def unlike(config: Mapping[str, Any]) -> str:
    """What of a Cosmos Predict 2, or of what was made of it, the host does not run, or empty."""
    if config.get("extra_pos_embed_type") is not None:
        return Text("ComfyUI runs a {model} without learnable positions only; config.json says extra_pos_embed_type "
                    "{kind}", model=TITLE, kind=config["extra_pos_embed_type"])
    heads, channels = config.get("num_attention_heads") or 16, config.get("in_channels") or 16
    return cosmos1.differs(TITLE, config, LAYERS.get(heads, 0), ROPE.get((heads, channels), ()))


CLASS = Derived(
    title=TITLE, hosts=("CosmosT2IPredict2", "CosmosI2VPredict2"), table="cosmos2", classes=cosmos1.CLASS.classes,
    marks=cosmos1.CLASS.marks[1:],
    # positions: Cosmos 1; the next two: Predict 2.5 and Transfer 2.5
    never=("learnable_pos_embed.", "crossattn_proj.", "img_context_proj.", ADAPTER),
    fixed={
        **{key: value for key, value in cosmos1.CLASS.fixed.items() if key not in ("extra_pos_embed_type", "max_size")},
        "num_attention_heads": (16, 40),
    },
    free=cosmos1.CLASS.free | {"extra_pos_embed_type", "max_size"},
    refuses=_refuses,
)

"""Anima: Cosmos Predict 2 behind an adapter of text, which is a component of its own in diffusers
(comfy/ldm/anima/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from . import cosmos2

TITLE, ADAPTER = "Anima", "text_conditioner"
# what the host's adapter has in its code
SIZES = {"source_dim": 1024, "target_dim": 1024, "model_dim": 1024, "num_layers": 6, "num_attention_heads": 16,
         "mlp_ratio": 4.0, "target_vocab_size": 32128, "use_self_attention": True, "use_layer_norm": False,
         "min_sequence_length": 512}


def _refuses(config: Mapping[str, Any]) -> str:
    adapter = config.get(f"_{ADAPTER}")
    if adapter is None:
        return Text("without {part} beside it this is no {model}", part=ADAPTER, model=TITLE)
    for key, value in SIZES.items():
        if adapter.get(key) not in (None, value):
            return Text("ComfyUI does not run a {model} like this one; config.json says {differs}", model=TITLE,
                        differs=Text("{key} {value} (ComfyUI: {fixed})", key=key, value=adapter[key], fixed=value))
    return cosmos2.unlike(config)


CLASS = cosmos2.CLASS._replace(
    title=TITLE, hosts=("Anima",), table="anima", marks=(*cosmos2.CLASS.marks, cosmos2.ADAPTER), refuses=_refuses,
    never=tuple(mark for mark in cosmos2.CLASS.never if mark != cosmos2.ADAPTER),
    companions={ADAPTER: "diffusers.models.condition_embedders.condition_embedder_anima"})

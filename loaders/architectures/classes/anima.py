"""Anima: Cosmos Predict 2 behind an adapter of text, which is a component of its own in diffusers
(comfy/ldm/anima/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Companion
from . import cosmos2

TITLE, ADAPTER = "Anima", "text_conditioner"


def _refuses(config: Mapping[str, Any]) -> str:
    return cosmos2.unlike(config) if config.get(f"_{ADAPTER}") is not None else \
        Text("without {part} beside it this is no {model}", part=ADAPTER, model=TITLE)


CLASS = cosmos2.CLASS._replace(
    title=TITLE, hosts=("Anima",), table="anima", marks=(*cosmos2.CLASS.marks, cosmos2.ADAPTER), refuses=_refuses,
    never=tuple(mark for mark in cosmos2.CLASS.never if mark != cosmos2.ADAPTER),
    companions={ADAPTER: Companion(
        "diffusers.models.condition_embedders.condition_embedder_anima",
        fixed={  # what the host's adapter has in its code
            "source_dim": (1024,), "target_dim": (1024,), "model_dim": (1024,), "num_layers": (6,),
            "num_attention_heads": (16,), "mlp_ratio": (4.0, 4), "target_vocab_size": (32128,),
            "use_self_attention": (True,), "use_layer_norm": (False,), "min_sequence_length": (512,),
        },
        free=frozenset())})

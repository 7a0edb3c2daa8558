"""Ministral 3 3B (Mistral3Model, text_encoder of ERNIE-Image), whose last but one hidden state is read, of a prompt as
it is (diffusers, pipelines/ernie_image; comfy/text_encoders/ernie.py).

The host computes it without the scaling (YaRN) of its rotary embedding; the report says it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from . import mistral3
from .base import Family
from .llm import ORIGIN, sizes, text_part
from .llm import modules as llm_modules

# comfy/text_encoders/llama.py, Ministral3_3BConfig; the width is what the host knows the model by (comfy/sd.py)
HOST = {"vocab_size": 131072, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}
FIXED = {"hidden_size": 3072, "sliding_window": None, "attention_bias": False}
ROPES = ("rope_parameters", "rope_scaling")


def unscaled(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary embedding that the host computes: the base angle without YaRN."""
    text = dict(config.get("text_config") or config)
    for key in ROPES:
        rope = text.get(key)
        if isinstance(rope, dict) and "yarn" in (rope.get("rope_type"), rope.get("type")):
            text[key] = {"rope_type": "default", **{name: rope[name] for name in ("rope_theta",) if name in rope}}
    return {**config, "text_config": text}


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules."""
    return llm_modules(text_part(unscaled(config)))


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Ministral 3 3B's. Raises CheckpointError for what the host's code fixes."""
    text = text_part(unscaled(config))
    if text["num_hidden_layers"] < 3:
        raise CheckpointError(Text("ComfyUI's {model} text encoder needs {layers} layers or more", model="ERNIE-Image",
                                   layers=3), ORIGIN, Text("use the base's own text encoder"))
    return sizes(text, HOST, FIXED)


def note(config: dict[str, Any]) -> str:
    """What the host does otherwise, and what of the folder goes unused."""
    unused = Text("the vision tower and its projector are not part of ERNIE-Image's conditioning and were left out")
    text = config.get("text_config") or config
    scaled = any("yarn" in str((text.get(key) or {}).get("rope_type", (text.get(key) or {}).get("type")))
                 for key in ROPES)
    return Text("{note}. ComfyUI computes Ministral 3 without the scaling (YaRN) of its rotary embedding",
                note=unused) if scaled else unused


MINISTRAL3 = replace(
    mistral3.MISTRAL3, title="Ministral 3", classes=("Mistral3Model", "Mistral3ForConditionalGeneration"),
    host_name="ministral3_3b", modules=modules, host_config=host_config, told=lambda config, names: config, note=note)
FAMILIES = (Family("ERNIE-Image", "FLUX2", (("text_encoder", "tokenizer", MINISTRAL3),), "ErnieTEModel",
                   ("ErnieImage",)),)

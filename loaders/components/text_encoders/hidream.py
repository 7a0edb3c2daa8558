"""HiDream-I1: CLIP-L and CLIP-G of 248 positions for their projected pooled outputs, T5 XXL, and all hidden states of
Llama 3.1 8B (diffusers, pipelines/hidream_image; comfy/text_encoders/hidream.py).

The host computes Llama without the scaling of Llama 3.1's rotary embedding; the report says it. Of a base without
Llama, which its publishers leave out of the folder, it makes nothing: it has to be there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from . import clip_g, llama, sd3, t5
from .base import Family
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

SCALING = ("rope_parameters", "rope_scaling")


def unscaled(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary embedding that the host computes: Llama 3.1's base angle without its scaling."""
    found = dict(config)
    for key in SCALING:
        rope = found.get(key)
        if isinstance(rope, dict) and "llama3" in (rope.get("rope_type"), rope.get("type")):
            found[key] = {name: value for name, value in rope.items() if name == "rope_theta"} or None
    return found


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llama.modules."""
    return llama.modules(unscaled(config), names)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Llama 3 8B's. Raises CheckpointError for what the host's code fixes."""
    return llama.host_config(unscaled(config))


def note(config: dict[str, Any]) -> str:
    """What the host does otherwise."""
    if unscaled(config) == config:
        return ""
    return Text("ComfyUI computes Llama 3.1 without the scaling of its rotary embedding")


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has Llama 3's tokenizer, with other special tokens. Raises CheckpointError for other pieces."""
    refuse_another(source, *llama.BUNDLED, added=False)
    return {}


LLAMA = replace(llama.LLAMA, title="Llama 3.1", classes=("LlamaForCausalLM", "LlamaModel"), modules=modules,
                host_config=host_config, tokenizer=tokenizer, note=note)
FAMILIES = (Family("HiDream", "HIDREAM", (
    ("text_encoder", "tokenizer", sd3.PROJECTED), ("text_encoder_2", "tokenizer_2", clip_g.CLIP_G),
    ("text_encoder_3", "tokenizer_3", t5.T5_XXL), ("text_encoder_4", "tokenizer_4", LLAMA)), "HiDreamTEModel",
    ("HiDream",)),)

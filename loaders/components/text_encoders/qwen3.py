"""Qwen3: 4B, the text encoder of Z-Image and of FLUX.2 klein 4B, 8B, that of FLUX.2 klein 9B, and Ovis 2.5's of 2B,
that of Ovis-Image, which reads the last hidden state of 284 tokens less its system prompt, with zeros for padding.

Z-Image reads the last but one hidden state; the host does the same, of the same token ids: its prompt is the chat
template of Qwen3's tokenizer with thinking left on. FLUX.2 klein reads hidden states 9, 18 and 27 beside each other,
with thinking off (diffusers, pipelines/flux2/pipeline_flux2_klein.py; comfy/text_encoders/flux.py, Qwen3_4BModel). Both
pad klein's prompts to 512 tokens. diffusers cuts prompts at 512 tokens, the host does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import Encoder, Family, exchanging, linear
from .llm import KNOWN, ORIGIN, UNNEEDED, sizes, text_part
from .llm import modules as llm_modules
from .qwen_tokenizer import same_as_bundled

# comfy/text_encoders/llama.py, Qwen3_4BConfig and Qwen3_8BConfig; the width is what the host knows the model by
# (comfy/sd.py)
HOST_4B = {"vocab_size": 151936, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
HOST_8B = {**HOST_4B, "intermediate_size": 12288}
HOST_2B = {**HOST_4B, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
WIDTH_2B, WIDTH_4B, WIDTH_8B = 2048, 2560, 4096


PREFIXES = {"lm_head.": "model.lm_head.", "model.": "model.", "": "model."}
CALLED = exchanging(PREFIXES, r"^(model\.)?lm_head\.|" + UNNEEDED)  # 4B's logits are its embedding once more
WITH_HEAD = exchanging(PREFIXES, UNNEEDED)


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules."""
    return llm_modules(text_part(config), norms=True)


def modules_8b(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """The same with lm_head, by which the host writes text; conditioning does not read it."""
    text = text_part(config)
    yield from llm_modules(text, norms=True)
    if has_head(config):
        yield linear("model.lm_head", text["vocab_size"], text["hidden_size"])


def called_8b(name: str, config: dict[str, Any]) -> str | None:
    """8B's lm_head is no copy of its embedding, where it is one at all."""
    return (WITH_HEAD if has_head(config) else CALLED)(name, config)


def told(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A file may leave lm_head out."""
    return config if any(".lm_head." in name for name in names) else {**config, "tie_word_embeddings": True}


def has_head(config: dict[str, Any]) -> bool:
    """Whether there is a lm_head that is not the embedding (transformers, Qwen3Config: so by default)."""
    return (config.get("architectures") or [""])[0] == "Qwen3ForCausalLM" and not config.get("tie_word_embeddings")


def host_config(config: dict[str, Any], host: dict[str, Any], width: int, layers: int, whose: str) -> dict[str, Any]:
    """Sizes that differ from `host`. Raises CheckpointError for what the host's code fixes: the width, and a depth of
    `layers` at least."""
    text = text_part(config)
    text["head_dim"] = text.get("head_dim") or 128  # transformers' default for Qwen3, whatever the width
    if text["num_hidden_layers"] < layers:
        raise CheckpointError(Text("ComfyUI's {model} text encoder needs {layers} layers or more", model=whose,
                                   layers=layers), ORIGIN, Text("use the base's own text encoder"))
    return sizes(text, host, {"hidden_size": width, "attention_bias": False})


def host_config_8b(config: dict[str, Any]) -> dict[str, Any]:
    """As klein's 4B; the host expects a lm_head unless it is told that there is none."""
    different = host_config(config, HOST_8B, WIDTH_8B, 27, "FLUX.2 klein")
    return different if has_head(config) else {**different, "lm_head": False}


CLASSES = ("Qwen3ForCausalLM", "Qwen3Model")
QWEN3 = Encoder("Qwen3", CLASSES, "qwen3_4b", KNOWN, CALLED, modules,
                partial(host_config, host=HOST_4B, width=WIDTH_4B, layers=3, whose="Z-Image"), same_as_bundled)
KLEIN_9B = Encoder("Qwen3", CLASSES, "qwen3_8b", KNOWN, called_8b, modules_8b, host_config_8b, same_as_bundled,
                   told=told)
KLEIN_4B = replace(
    QWEN3, host_config=partial(host_config, host=HOST_4B, width=WIDTH_4B, layers=27, whose="FLUX.2 klein"),
    other=lambda config: KLEIN_9B if config.get("hidden_size") == WIDTH_8B else None)
FAMILY = Family("Z-Image", "LUMINA2", (("text_encoder", "tokenizer", QWEN3),), "ZImageTEModel", ("ZImage",))
KLEIN = Family("FLUX.2 klein", "FLUX2", (("text_encoder", "tokenizer", KLEIN_4B),), "Flux2TEModel", ("Flux2Klein",))
OVIS_2B = replace(QWEN3, host_name="qwen3_2b", host_config=partial(
    host_config, host=HOST_2B, width=WIDTH_2B, layers=1, whose="Ovis-Image"))
OVIS = Family("Ovis-Image", "OVIS", (("text_encoder", "tokenizer", OVIS_2B),), "OvisTEModel", ("OvisImage",))
FAMILIES = (FAMILY, KLEIN, OVIS)

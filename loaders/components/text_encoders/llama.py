"""Llama 3 8B, alone (LlamaModel) or as the language half of LLaVA (text_encoder of HunyuanVideo and its I2V)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import Encoder, exchanging, host_sizes
from .llm import KNOWN, UNNEEDED
from .llm import modules as llm_modules
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

BUNDLED = ("text_encoders", "llama_tokenizer")
PROBE = "<|end_header_id|>\n\nTwo cats, 1234 snowflakes;  naïve été<|eot_id|>"
LLAVA = "LlavaForConditionalGeneration"
# comfy/text_encoders/llama.py, Llama2Config
SIZES = {"vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
FIXED = {"head_dim": 128, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# What transformers takes where config.json says nothing; below LLaVA's text_config it leaves its defaults out
DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "rms_norm_eps": 1e-6}
# What LLaVA calls its language model: saved by transformers 4 and 5, and in 5's memory
PREFIXES = dict.fromkeys(("language_model.model.", "model.language_model.", "language_model.", "model.", ""), "model.")


# Images reach the host's HunyuanVideo through a CLIP_VISION of its own, the logits nobody reads.
CALLED = exchanging(PREFIXES, r"^(model\.)?(vision_tower|multi_modal_projector)\.|^(language_model\.)?lm_head\.|"
                    + UNNEEDED)


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules."""
    return llm_modules(_text(config))


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Llama 3 8B's. Raises CheckpointError for what the host's code fixes."""
    text = _text(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(Text("ComfyUI's Llama has no {kind} rotary embedding",
                                   kind=rope.get("rope_type", rope.get("type"))), "",
                              Text("use the base's own text encoder"))
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    return host_sizes(text, SIZES, FIXED)


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's values, with transformers' where config.json has none."""
    text = {**DEFAULTS, **(config.get("text_config") or config), "architectures": config.get("architectures")}
    heads = text["num_attention_heads"]
    return text | {"num_key_value_heads": text.get("num_key_value_heads") or heads,
                   "head_dim": text.get("head_dim") or text["hidden_size"] // heads}


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has LLaVA Llama 3's tokenizer. Raises CheckpointError for another."""
    refuse_another(source, *BUNDLED)
    return {}


def note(config: dict[str, Any]) -> str:
    """What becomes of LLaVA's eyes."""
    if (config.get("architectures") or [""])[0] != LLAVA:
        return ""
    return Text("the vision tower and projector are not part of a CLIP: images go in by Load CLIP Vision "
                "(llava_llama3_vision) and Text Encode Hunyuan Video (Image To Video)")


def repair(host_tokenizer: Any, source: Source) -> str:
    """Byte-level BPE by the letter of tokenizer.json, whichever transformers the host runs on."""
    path = Path(source.folder, "tokenizer.json")
    path = path if path.is_file() else Path(host.bundled_tokenizer(*BUNDLED, "tokenizer.json"))
    if host.follow_tokenizer_json(host_tokenizer, str(path), PROBE):
        return Text("ComfyUI's Llama tokenizer loses spaces with this version of transformers; this CLIP splits text "
                    "by the base's tokenizer.json")
    return ""


LLAMA = Encoder("Llama 3", ("LlamaModel", "LlamaForCausalLM", LLAVA), "llama", KNOWN, CALLED, modules, host_config,
                tokenizer, note=note, repair=repair)

"""Gemma 2 2B, the text encoder of Lumina 2: Gemma2Model, whose last but one hidden state the pipeline takes.

The host computes attention without the soft cap of its logits (50) that Gemma 2 was trained with and transformers has;
the report says it. The pipeline puts a system prompt before the text, which the host leaves to its node CLIP Text
Encode for Lumina2. Windows of attention are longer than prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from ...errors import CheckpointError
from .base import Encoder, Family, exchanging, host_sizes
from .llm import KNOWN, ORIGIN, UNNEEDED, text_part
from .llm import modules as llm_modules
from .vocabulary import sentencepiece

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

HEAD = 256
# comfy/text_encoders/llama.py, Gemma2_2B_Config
HOST = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
FIXED = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "hidden_activation": "gelu_pytorch_tanh",
         "attention_bias": False}
CALLED = exchanging({"model.": "model.", "": "model."}, r"^(model\.)?lm_head\.|" + UNNEEDED)
LONGEST = 256  # tokens of a prompt in the pipeline


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See llm.modules; four norms a layer."""
    return llm_modules(text_part(config), head=HEAD,
                       around=("input", "post_attention", "pre_feedforward", "post_feedforward"))


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Gemma 2 2B's. Raises CheckpointError for what the host's code fixes."""
    text = text_part(config)
    window = text.get("sliding_window")
    if window is not None and window < LONGEST:
        raise CheckpointError(Text("ComfyUI's text encoder has no attention window of {window} tokens", window=window),
                              ORIGIN, Text("use the base's own text encoder"))
    return host_sizes({"head_dim": HEAD, **text}, HOST, FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The folder's SentencePiece model; see vocabulary.sentencepiece."""
    return sentencepiece(source, "tokenizer.model")


def note(config: dict[str, Any]) -> str:
    """What diffusers does otherwise."""
    cap = config.get("attn_logit_softcapping")
    text = Text("Lumina 2's prompts begin with a system prompt in diffusers; CLIP Text Encode for Lumina2 puts it "
                "there")
    return Text("{note}. ComfyUI computes Gemma 2's attention without the soft cap of its logits ({cap:g})", note=text,
                cap=cap) if cap else text


GEMMA2 = Encoder("Gemma 2", ("Gemma2Model", "Gemma2ForCausalLM"), "gemma2_2b", KNOWN, CALLED, modules, host_config,
                 tokenizer, note=note)
FAMILIES = (Family("Lumina 2", "LUMINA2", (("text_encoder", "tokenizer", GEMMA2),), "LuminaModel", ("Lumina2",)),)

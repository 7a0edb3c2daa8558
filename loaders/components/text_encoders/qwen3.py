"""Qwen3 4B, the text encoder of Z-Image.

Z-Image reads the last but one hidden state; the host does the same, of the same token ids: its prompt is the chat
template of Qwen3's tokenizer with thinking left on. diffusers cuts prompts at 512 tokens, the host does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from .base import Encoder, Family
from .llm import ORIGIN, rename, shapes, sizes, text_part
from .qwen_tokenizer import same_as_bundled

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/llama.py, Qwen3_4BConfig; the width is what the host knows the model by (comfy/sd.py)
HOST = {"vocab_size": 151936, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
FIXED = {"hidden_size": 2560, "attention_bias": False}


def convert(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Qwen3ForCausalLM's or Qwen3Model's names -> model. ...; the logits (lm_head) nobody reads."""
    return rename(tensors, {"model.": "model.", "": "model."}, ("lm_head.",), shapes(text_part(config), norms=True),
                  "Qwen3")


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Qwen3 4B's. Raises CheckpointError for what the host's code fixes."""
    text = text_part(config)
    text["head_dim"] = text.get("head_dim") or 128  # transformers' default for Qwen3, whatever the width
    if text["num_hidden_layers"] < 3:
        raise CheckpointError("ComfyUI's Z-Image text encoder needs 3 layers or more", ORIGIN,
                              "use the base's own text encoder")
    return sizes(text, HOST, FIXED)


QWEN3 = Encoder(("Qwen3ForCausalLM", "Qwen3Model"), "qwen3_4b", convert, host_config, same_as_bundled)
FAMILY = Family("Z-Image", "LUMINA2", (("text_encoder", "tokenizer", QWEN3),), "ZImageTEModel", ("ZImage",))
FAMILIES = (FAMILY,)

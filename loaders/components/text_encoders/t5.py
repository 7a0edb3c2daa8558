"""T5 v1.1 XXL's encoder: T5EncoderModel (text_encoder_2 of FLUX.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Encoder, host_sizes, tied
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

# comfy/text_encoders/t5_config_xxl.json; the rest is fixed in comfy/text_encoders/t5.py
SIZES = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24}
FIXED = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
         "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}
# The host knows a T5-XXL by this tensor's rows
MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


def convert(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The embedding, which is tied to the encoder's, by one name. A decoder, which older exports keep, is unneeded:
    transformers leaves it aside, too."""
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    return tied(encoder, "shared.weight", ("encoder.embed_tokens.weight",))


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from T5-XXL's. Raises CheckpointError for other activations, norms and position buckets."""
    return host_sizes(config, {**SIZES, "vocab_size": 32128}, FIXED)


def marks(config: dict[str, Any]) -> dict[str, Tensor]:
    """An empty tensor by which the host takes an encoder of fewer than 24 blocks for what it is."""
    import torch

    return {MARK: torch.empty(SIZES["d_ff"], 0)} if config.get("num_layers", 24) < 24 else {}


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has T5's tokenizer. Raises CheckpointError for another."""
    refuse_another(source, "text_encoders", "t5_tokenizer")
    return {}


T5_XXL = Encoder(("T5EncoderModel",), "t5xxl", convert, host_config, tokenizer, marks=marks)

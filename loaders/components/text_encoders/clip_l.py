"""CLIP-L: CLIPTextModel, of which the pipelines use the pooled output (text_encoder of FLUX.1, 2 of HunyuanVideo), or
the last but one hidden state (text_encoder of SDXL)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Encoder, host_sizes
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

# comfy/sd1_clip_config.json; the vocabulary and the epsilon are fixed in comfy/clip_model.py
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
FIXED = {"vocab_size": 49408, "layer_norm_eps": 1e-5}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
# transformers takes the highest token for the end where the config has 2 (written before version 4.24), which is 49407
END = (2, 49407)


def convert(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Names of transformers 4 (text_model.encoder...) and 5 (encoder...) -> the former. `position_ids` are constants.

    CLIPTextModel has no projection; the host computes one beside the pooled output that the pipelines take, so it gets
    the identity instead of memory that nobody has written to.
    """
    import torch

    out = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
           for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    norm = out.get("text_model.final_layer_norm.weight")
    if "text_projection.weight" not in out and norm is not None:
        out["text_projection.weight"] = torch.eye(norm.shape[0], dtype=norm.dtype)
    return out


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from CLIP-L's. Raises CheckpointError for another vocabulary, epsilon, activation or end."""
    return sizes_of(config, SIZES, {})


def sizes_of(config: dict[str, Any], sizes: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The same for a CLIP of other `sizes`, with more that is `fixed`."""
    act, end = config.get("hidden_act", "quick_gelu"), config.get("eos_token_id", 49407)
    return host_sizes(config, sizes, {**FIXED, **fixed, "hidden_act": act if act in ACTIVATIONS else ACTIVATIONS[0],
                                      "eos_token_id": end if end in END else END[1]})


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has CLIP's tokenizer. Raises CheckpointError for another."""
    refuse_another(source, "sd1_tokenizer")
    return {}


CLIP_L = Encoder(("CLIPTextModel",), "clip_l", convert, host_config, tokenizer)

"""CLIP-L: CLIPTextModel, of which the pipelines use the pooled output (text_encoder of FLUX.1, 2 of HunyuanVideo and
Kandinsky 5), the last but one hidden state (text_encoder of SDXL), or the last (Stable Diffusion 1)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ...architectures.base import Module
from .base import OF_TOKENIZERS, Encoder, Family, Known, embedding, exchanging, host_sizes, linear, plain
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


KNOWN = Known("text_model.final_layer_norm.weight", "hidden_size")
# Names of transformers 4 (text_model.encoder...) and 5 (encoder...) -> the former. The positions' numbers are
# constants.
CALLED = exchanging({"text_model.": "text_model.", "text_projection.": "text_projection.", "": "text_model."},
                    rf"(^|\.)embeddings\.position_ids$|{OF_TOKENIZERS}")


def modules(config: dict[str, Any], names: Collection[str], sizes: dict[str, Any] = SIZES,
            projected: bool = False) -> Iterator[Module]:
    """CLIP's text model, with the projection of its pooled output where it is stored, or has to be (`projected`)."""
    size = {**sizes, **FIXED, **{key: value for key, value in config.items() if value is not None}}
    width, inner = size["hidden_size"], size["intermediate_size"]
    yield embedding("text_model.embeddings.token_embedding", size["vocab_size"], width)
    yield plain("text_model.embeddings.position_embedding", size["max_position_embeddings"], width)
    for number in range(size["num_hidden_layers"]):
        here = f"text_model.encoder.layers.{number}"
        yield plain(f"{here}.layer_norm1", width, bias=True)
        for part in ("q", "k", "v", "out"):
            yield linear(f"{here}.self_attn.{part}_proj", width, width, bias=True)
        yield plain(f"{here}.layer_norm2", width, bias=True)
        yield linear(f"{here}.mlp.fc1", inner, width, bias=True)
        yield linear(f"{here}.mlp.fc2", width, inner, bias=True)
    yield plain("text_model.final_layer_norm", width, bias=True)
    if projected or any(name.startswith("text_projection.") for name in names):
        yield linear("text_projection", width, width)


def complete(tensors: dict[str, Tensor]) -> None:
    """CLIPTextModel has no projection; the host computes one beside the pooled output that the pipelines take, so it
    gets the identity instead of memory that nobody has written to."""
    import torch

    if not any(name.startswith("text_projection.") for name in tensors):
        norm = tensors["text_model.final_layer_norm.weight"]
        tensors["text_projection.weight"] = torch.eye(norm.shape[0], dtype=norm.dtype)


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


CLIP_L = Encoder("CLIP-L", ("CLIPTextModel",), "clip_l", KNOWN, CALLED, modules, host_config, tokenizer,
                 complete=complete)
FAMILIES = (Family("Stable Diffusion 1", "STABLE_DIFFUSION", (("text_encoder", "tokenizer", CLIP_L),), "SD1ClipModel",
                   ("StableDiffusion",)),)

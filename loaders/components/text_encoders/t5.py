"""T5 v1.1 XXL's encoder: T5EncoderModel (text_encoder_2 of FLUX.1, 3 of Stable Diffusion 3 and HiDream, the only one of
Chroma, PixArt, LTX-Video, Mochi and CogVideoX).

What is not padding is the same in diffusers and the host, with what the notes of the families name. Mochi and LTX-Video
let nothing look at the padding in the host; in diffusers' LTX-Video the encoder sees it, and only the transformer does
not. PixArt's and Chroma's prompts are not padded in the host, CogVideoX's to the same 226 tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import Module
from .base import OF_TOKENIZERS, Encoder, Family, Known, embedding, exchanging, host_sizes, linear, plain
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

# comfy/text_encoders/t5_config_xxl.json; the rest is fixed in comfy/text_encoders/t5.py
SIZES = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24}
BUCKETS = 32
FIXED = {"relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
         "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}
# The host knows a T5-XXL by this tensor's rows
MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


KNOWN = Known("encoder.final_layer_norm.weight", "d_model")
# A decoder, which older exports keep, is unneeded: transformers leaves it aside, too.
CALLED = exchanging({}, rf"^(decoder|lm_head)\.|{OF_TOKENIZERS}")
# The embedding is tied to the encoder's; files have it by one name, the other, or both.
TWINS = {"shared.weight": ("encoder.embed_tokens.weight",)}


def modules(config: dict[str, Any], names: Collection[str], every_block: bool = False,
            vocabulary: int = 32128, gated: bool = True) -> Iterator[Module]:
    """The encoder of a T5, gated or not; the position biases are in the first block, or in every one (UMT5)."""
    size = {**SIZES, "vocab_size": vocabulary, **{key: value for key, value in config.items() if value is not None}}
    width, inner, heads = size["d_model"], size["num_heads"] * size["d_kv"], size["num_heads"]
    yield embedding("shared", size["vocab_size"], width)
    for number in range(size["num_layers"]):
        here = f"encoder.block.{number}.layer"
        for part in ("q", "k", "v"):
            yield linear(f"{here}.0.SelfAttention.{part}", inner, width)
        yield linear(f"{here}.0.SelfAttention.o", width, inner)
        if every_block or not number:
            yield plain(f"{here}.0.SelfAttention.relative_attention_bias", BUCKETS, heads)
        yield plain(f"{here}.0.layer_norm", width)
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            yield linear(f"{here}.1.DenseReluDense.{part}", size["d_ff"], width)
        yield linear(f"{here}.1.DenseReluDense.wo", width, size["d_ff"])
        yield plain(f"{here}.1.layer_norm", width)
    yield plain("encoder.final_layer_norm", width)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from T5-XXL's. Raises CheckpointError for other activations, norms and position buckets."""
    return host_sizes(config, {**SIZES, "vocab_size": 32128}, FIXED)


def marks(config: dict[str, Any], mark: str = MARK, rows: int = SIZES["d_ff"]) -> dict[str, Tensor]:
    """An empty tensor by which the host takes an encoder of fewer than 24 blocks for what it is."""
    import torch

    return {mark: torch.empty(rows, 0)} if config.get("num_layers", 24) < 24 else {}


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has T5's tokenizer. Raises CheckpointError for another."""
    refuse_another(source, "text_encoders", "t5_tokenizer")
    return {}


T5_XXL = Encoder("T5", ("T5EncoderModel",), "t5xxl", KNOWN, CALLED, modules, host_config, tokenizer, TWINS,
                 marks=marks)
_ALONE = (("text_encoder", "tokenizer", T5_XXL),)
FAMILIES = (
    Family("Chroma", "CHROMA", _ALONE, "PixArtT5XXL", ("Chroma",), note=Text(
        "prompts are not padded; diffusers shows the model one token of padding behind the prompt, as "
        "T5TokenizerOptions with min_padding 1 does")),
    Family("PixArt", "PIXART", _ALONE, "PixArtT5XXL", ("PixArt",), note=Text(
        "diffusers writes prompts in small letters; ComfyUI leaves them as they are")),
    Family("LTX-Video", "LTXV", _ALONE, "MochiT5XXL", ("LTX",), note=Text(
        "the text encoder does not look at padding, as in LTX-Video's own code; in diffusers it does")),
    Family("Mochi", "MOCHI", _ALONE, "MochiT5XXL", ("Mochi",)),
    Family("CogVideoX", "COGVIDEOX", _ALONE, "CogVideoXT5XXL", ("CogVideoX",)))

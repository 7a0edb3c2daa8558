"""Chinese RoBERTa, a BERT (BertModel, text_encoder of Hunyuan-DiT).

Diffusers and the host take its last hidden states, pad to 77 tokens, and let nothing look at the padding (diffusers,
pipelines/hunyuandit; comfy/text_encoders/hydit.py). Nobody asks for its pooled output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .... import host
from ....host.texts import Text, joined
from ...architectures.base import Module
from ...errors import CheckpointError
from ...files.source import Source, read_json
from .base import OF_TOKENIZERS, Encoder, Known, embedding, exchanging, host_sizes, linear, plain
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/hydit_clip.json; the rest is fixed in comfy/text_encoders/bert.py
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 47020, "layer_norm_eps": 1e-12}
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "pad_token_id": 0}
BUNDLED = ("text_encoders", "hydit_clip_tokenizer")
SPLITS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}  # and their defaults

KNOWN = Known("bert.embeddings.LayerNorm.weight", "hidden_size")
# Names of BertModel, and of what is made around it (bert....)
CALLED = exchanging({"bert.": "bert.", "": "bert."},
                    rf"(^|\.)(pooler|cls)\.|(^|\.)embeddings\.position_ids$|{OF_TOKENIZERS}")


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """BERT's encoder."""
    size = {**SIZES, **{key: value for key, value in config.items() if value is not None}}
    width, inner = size["hidden_size"], size["intermediate_size"]
    yield embedding("bert.embeddings.word_embeddings", size["vocab_size"], width)
    yield plain("bert.embeddings.position_embeddings", size["max_position_embeddings"], width)
    yield plain("bert.embeddings.token_type_embeddings", size["type_vocab_size"], width)
    yield plain("bert.embeddings.LayerNorm", width, bias=True)
    for number in range(size["num_hidden_layers"]):
        here = f"bert.encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield linear(f"{here}.attention.{part}", width, width, bias=True)
        yield plain(f"{here}.attention.output.LayerNorm", width, bias=True)
        yield linear(f"{here}.intermediate.dense", inner, width, bias=True)
        yield linear(f"{here}.output.dense", width, inner, bias=True)
        yield plain(f"{here}.output.LayerNorm", width, bias=True)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from the host's. Raises CheckpointError for another activation, or other positions."""
    return host_sizes(config, SIZES, FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has it. Raises CheckpointError for another vocabulary, or other rules to split words by."""
    refuse_another(source, *BUNDLED)
    said, own = (read_json(str(path)) if path.is_file() else {} for path in (
        Path(source.folder, "tokenizer_config.json"), Path(host.bundled_tokenizer(*BUNDLED, "tokenizer_config.json"))))
    other = [Text("{key} {value}", key=key, value=said[key]) for key, default in SPLITS.items()
             if said.get(key, default) != own.get(key, default)]
    if other:
        raise CheckpointError(Text("the base has another tokenizer than ComfyUI's text encoder: {differences}",
                                   differences=joined(", ", other)), source.folder,
                              Text("use the base's own tokenizer; one of a finetune cannot be put into ComfyUI"))
    return {}


BERT = Encoder("BERT", ("BertModel",), "hydit_clip", KNOWN, CALLED, modules, host_config, tokenizer)

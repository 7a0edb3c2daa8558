"""mT5 XL's encoder (T5EncoderModel, text_encoder_2 of Hunyuan-DiT): T5 with a vocabulary of many languages.

Both pad to 256 tokens, and let nothing look at the padding (diffusers, pipelines/hunyuandit;
comfy/text_encoders/hydit.py). The host takes its tokenizer from whole checkpoints only, so that it is handed on here
(host.mt5_handed_on).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from .... import host
from ...architectures.base import Module
from . import bert, t5
from .base import Encoder, Family, host_sizes
from .vocabulary import sentencepiece

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

# comfy/text_encoders/mt5_config_xl.json
SIZES = {"d_ff": 5120, "d_kv": 64, "d_model": 2048, "num_heads": 32, "num_layers": 24}
VOCABULARY = 250112


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """See t5.modules."""
    return t5.modules({**SIZES, **config}, names, vocabulary=VOCABULARY)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from mT5 XL's. Raises CheckpointError as t5.host_config does."""
    return host_sizes(config, {**SIZES, "vocab_size": VOCABULARY}, t5.FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The folder's SentencePiece model; see vocabulary.sentencepiece."""
    return sentencepiece(source, "spiece.model")


MT5 = Encoder("mT5", ("T5EncoderModel", "MT5EncoderModel"), "mt5xl", t5.KNOWN, t5.CALLED, modules, host_config,
              tokenizer, t5.TWINS, during=host.mt5_handed_on)
FAMILIES = (Family("Hunyuan-DiT", "HUNYUAN_DIT", (("text_encoder", "tokenizer", bert.BERT),
                                                  ("text_encoder_2", "tokenizer_2", MT5)), "HyditModel",
                   ("HunyuanDiT",)),)

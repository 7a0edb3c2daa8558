"""UMT5-XXL's encoder: UMT5EncoderModel (text_encoder of Wan). T5 with position biases in every block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from . import t5
from .base import Encoder, host_sizes
from .vocabulary import sentencepiece

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from UMT5-XXL's. Raises CheckpointError as t5.host_config does."""
    return host_sizes(config, {**t5.SIZES, "vocab_size": 256384}, t5.FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The folder's SentencePiece model; see vocabulary.sentencepiece."""
    return sentencepiece(source, "spiece.model")


UMT5_XXL = Encoder("UMT5", ("UMT5EncoderModel",), "umt5xxl", t5.KNOWN, t5.CALLED,
                   partial(t5.modules, every_block=True, vocabulary=256384), host_config, tokenizer, t5.TWINS,
                   marks=t5.marks)

"""Pile-T5 XL's encoder (UMT5EncoderModel, text_encoder of AuraFlow): UMT5 with a SentencePiece model of its own.

Both pad to 256 tokens, let nothing look at the padding, and put zeros in its place (diffusers, pipelines/aura_flow;
comfy/text_encoders/aura_t5.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from . import t5
from .base import Encoder, Family, host_sizes
from .vocabulary import refuse_another

if TYPE_CHECKING:
    from torch import Tensor

    from ...files.source import Source

# comfy/text_encoders/t5_pile_config_xl.json
SIZES = {"d_ff": 5120, "d_kv": 64, "d_model": 2048, "num_heads": 32, "num_layers": 24}


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from Pile-T5 XL's. Raises CheckpointError as t5.host_config does."""
    return host_sizes(config, {**SIZES, "vocab_size": 32128}, t5.FIXED)


def tokenizer(source: Source) -> dict[str, Tensor]:
    """The host has Pile-T5's pieces, without the <extra_id>s. Raises CheckpointError for others."""
    refuse_another(source, "text_encoders", "t5_pile_tokenizer", added=False)
    return {}


def marks(config: dict[str, Any]) -> dict[str, Tensor]:
    """An empty tensor by which the host takes an encoder of fewer than 24 blocks for what it is."""
    return t5.marks(config, t5.MARK, SIZES["d_ff"])


PILE_T5 = Encoder("Pile-T5", ("UMT5EncoderModel",), "pile_t5xl", t5.KNOWN, t5.CALLED,
                  partial(t5.modules, every_block=True), host_config, tokenizer, t5.TWINS, marks=marks)
FAMILIES = (Family("AuraFlow", "STABLE_DIFFUSION", (("text_encoder", "tokenizer", PILE_T5),), "AuraT5Model",
                   ("AuraFlow",)),)

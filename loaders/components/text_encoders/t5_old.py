"""T5 v1.0 11B's encoder (T5EncoderModel, text_encoder of Cosmos 1 and Cosmos Predict 2): ReLU, without a gate.

Both pad to 512 tokens, let nothing look at the padding, and put zeros in its place (diffusers, pipelines/cosmos;
comfy/text_encoders/cosmos.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...architectures.base import Module
from . import t5
from .base import Family, host_sizes

if TYPE_CHECKING:
    from torch import Tensor

# comfy/text_encoders/t5_old_config_xxl.json
SIZES = {"d_ff": 65536, "d_kv": 128, "d_model": 1024, "num_heads": 128, "num_layers": 24}
FIXED = {**t5.FIXED, "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
MARK = "encoder.block.23.layer.1.DenseReluDense.wi.weight"


def modules(config: dict[str, Any], names: Collection[str]) -> Iterator[Module]:
    """The encoder of a T5 without gates."""
    return t5.modules({**SIZES, **config}, names, gated=False)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from T5 11B's. Raises CheckpointError for other activations, norms and position buckets."""
    return host_sizes(config, {**SIZES, "vocab_size": 32128}, FIXED)


def marks(config: dict[str, Any]) -> dict[str, Tensor]:
    """An empty tensor by which the host takes an encoder of fewer than 24 blocks for what it is."""
    return t5.marks(config, MARK, SIZES["d_ff"])


T5_OLD = replace(t5.T5_XXL, modules=modules, host_config=host_config, marks=marks)
FAMILIES = (Family("Cosmos", "COSMOS", (("text_encoder", "tokenizer", T5_OLD),), "CosmosT5XXL", ("Cosmos",)),)

"""diffusers AutoencoderKLQwenImage: Wan 2.1's network and names, for single frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Plan, VAEClass
from .wan import FIXED, LATENT, WITHOUT_EFFECT, plain


def _plan(config: Mapping[str, Any]) -> Plan:
    return plain(config, "Qwen-Image", "input_channels", "input_channels")


QWEN_IMAGE = VAEClass(
    "AutoencoderKLQwenImage", {**FIXED, "z_dim": LATENT},
    frozenset({"base_dim", "latents_mean", "latents_std", "input_channels"}), WITHOUT_EFFECT, _plan)

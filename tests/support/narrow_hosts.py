"""Narrow models of the classes whose sizes the host has in its code, beside models of the published sizes: for the server
of the example workflows, which has all of them at once (support/host_models.detected knows one at a time)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from support.derived import CASES
from support.host_models import MODELS

# The host's `image_model` -> our table, the weight by whose rows a published one is told, and these.
PUBLISHED = {"chroma": ("chroma", "img_in.weight", 3072)}
SIZES: dict[str, dict[str, Any]] = {}  # of the host's tiny models (support/host_sizes), where the workflows' are others


def sized(model: str) -> dict[str, Any]:
    """What the host builds one of."""
    return {**MODELS[model][1], **SIZES.get(model, {})}


@contextlib.contextmanager
def small_widths() -> Iterator[None]:
    """Let the host build narrow ones, and diffusers' classes be narrow where a config.json says nothing: it may not say
    what the host has in its code."""
    import comfy.model_detection
    import diffusers

    detect, inits = comfy.model_detection.detect_unet_config, {}

    def detect_widths(tensors: dict, prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        config = detect(tensors, prefix, *args, **kwargs)
        table, weight, rows = PUBLISHED.get((config or {}).get("image_model"), ("", "", 0))
        return sized(CASES[table][0].model) if table and tensors[f"{prefix}{weight}"].shape[0] != rows else config

    def narrow(init: Any, sizes: dict[str, Any]) -> Any:
        return functools.wraps(init)(lambda self, *args, **given: init(self, *args, **{**sizes, **given}))

    comfy.model_detection.detect_unet_config = detect_widths
    for table, kind in CLASSES.items():
        inits[kind] = getattr(diffusers, kind).__init__
        getattr(diffusers, kind).__init__ = narrow(inits[kind], CASES[table][0].config)
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect
        for kind, init in inits.items():
            getattr(diffusers, kind).__init__ = init


CLASSES = {"chroma": "ChromaTransformer2DModel"}

"""Narrow models of the classes whose sizes the host has in its code, beside models of the published sizes: for the server
of the example workflows, which has all of them at once (support/host_models.detected knows one at a time)."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from support.derived import CASES
from support.host_models import MODELS, resized

# The host's `image_model` -> our table, the weight by whose rows a published one is told, and these.
PUBLISHED = {"chroma": ("chroma", "img_in.weight", 3072), "hidream": ("hidream", "x_embedder.proj.weight", 2560)}
CLASSES = {"chroma": "ChromaTransformer2DModel", "hidream": "HiDreamImageTransformer2DModel"}
# Of tables, where the workflows' models are of other sizes than the cases', by names that host and diffusers share.
SIZES: dict[str, dict[str, Any]] = {"hidream": {"text_emb_dim": 96}}
# What ComfyUI's own loader of four text encoders is to build; support/bases_native.py makes them.
FOUR: dict[str, Any] = {
    "model_config": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3},
    "t5xxl_model_config": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4},
    "llama_model_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "num_key_value_heads": 1}}


def sized(table: str) -> dict[str, Any]:
    """What the host builds a model of."""
    return {**MODELS[CASES[table][0].model][1], **SIZES.get(table, {})}


@contextlib.contextmanager
def small_widths() -> Iterator[None]:
    """Let the host build narrow ones, and diffusers' classes be narrow where a config.json says nothing: it may not say
    what the host has in its code."""
    import comfy.model_detection
    import comfy.sd
    import comfy.text_encoders.lt
    import diffusers

    detect, encoders, inits = comfy.model_detection.detect_unet_config, comfy.sd.load_text_encoder_state_dicts, {}

    def detect_widths(tensors: dict, prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        config = detect(tensors, prefix, *args, **kwargs)
        table, weight, rows = PUBLISHED.get((config or {}).get("image_model"), ("", "", 0))
        return sized(table) if table and tensors[f"{prefix}{weight}"].shape[0] != rows else config

    def narrow(init: Any, sizes: dict[str, Any]) -> Any:
        return functools.wraps(init)(lambda self, *args, **given: init(self, *args, **{**sizes, **given}))

    def narrow_encoders(given: list, *args: Any, model_options: Any = None, **kwargs: Any) -> Any:
        four = len(given) == 4 and not model_options  # this pack's loader says the sizes itself
        return encoders(given, *args, model_options=copy.deepcopy(FOUR) if four else model_options or {}, **kwargs)

    gemma = comfy.text_encoders.lt.Gemma3_12BTokenizer  # pads prompts to 1024 tokens
    comfy.text_encoders.lt.Gemma3_12BTokenizer = resized(gemma, {1024: 16})
    comfy.model_detection.detect_unet_config, comfy.sd.load_text_encoder_state_dicts = detect_widths, narrow_encoders
    for table, kind in CLASSES.items():
        inits[kind] = getattr(diffusers, kind).__init__
        getattr(diffusers, kind).__init__ = narrow(inits[kind], {**CASES[table][0].config, **SIZES.get(table, {})})
    try:
        yield
    finally:
        comfy.text_encoders.lt.Gemma3_12BTokenizer = gemma
        comfy.model_detection.detect_unet_config, comfy.sd.load_text_encoder_state_dicts = detect, encoders
        for kind, init in inits.items():
            getattr(diffusers, kind).__init__ = init

"""The registry of text encoders: which families of bases there are, and which of them a model_index.json is."""

from __future__ import annotations

from typing import Any

from ....host.texts import Text
from ...errors import CheckpointError
from ...names import is_of, text_classes
from .base import Family


def families() -> tuple[Family, ...]:
    """Every family, in the order in which they are tried."""
    from . import (
        clip_g,
        clip_l,
        gemma2,
        gemma3,
        hidream,
        llama,
        ministral3,
        mistral3,
        mt5,
        pile_t5,
        qwen3,
        qwen3_vl,
        qwen25_vl,
        sd3,
        t5,
        t5_old,
        umt5,
    )

    return (
        Family("FLUX.1", "FLUX", (("text_encoder", "tokenizer", clip_l.CLIP_L),
                                  ("text_encoder_2", "tokenizer_2", t5.T5_XXL)), "FluxClipModel", ("Flux",),
               (("t5xxl_min_length", 512),),
               Text("T5 prompts are padded to 512 tokens as diffusers does (ComfyUI's own loaders: 256); "
                    "T5TokenizerOptions changes it")),
        Family("Wan", "WAN", (("text_encoder", "tokenizer", umt5.UMT5_XXL),), "WanT5Model",
               ("Wan", "SkyReelsV2", "ChronoEdit")),
        Family("HunyuanVideo", "HUNYUAN_VIDEO", (("text_encoder_2", "tokenizer_2", clip_l.CLIP_L),
                                                 ("text_encoder", "tokenizer", llama.LLAMA)),
               "HunyuanVideoClipModel", ("HunyuanVideo", "HunyuanSkyreels")),
        *mistral3.FAMILIES, *qwen25_vl.FAMILIES, *qwen3.FAMILIES, *qwen3_vl.FAMILIES,
        *clip_g.FAMILIES, *gemma2.FAMILIES, *sd3.FAMILIES, *t5.FAMILIES, *t5_old.FAMILIES, *pile_t5.FAMILIES,
        *hidream.FAMILIES, *ministral3.FAMILIES, *gemma3.FAMILIES, *clip_l.FAMILIES,
        *mt5.FAMILIES)


def family_of(index: dict[str, Any]) -> Family:
    """The family of a base, by the pipeline's class and those of all its text encoders.

    Raises CheckpointError with the names of both when there is none.
    """
    pipeline, named = str(index.get("_class_name", "")), text_classes(index)
    for family in families():
        if is_of(index, named, family.pipelines, {folder: encoder.classes for folder, _, encoder in family.encoders}):
            return family
    encoders = ", ".join(f"{name} {kind}" for name, kind in named.items()) or Text("no text encoder")
    raise CheckpointError(Text("the text encoders of {pipeline} are not supported: {encoders}",
                               pipeline=pipeline or Text("this pipeline"), encoders=encoders), "model_index.json",
                          Text("supported: {names}", names=", ".join(
                              dict.fromkeys(family.name for family in families()))))

"""CLIP-G (OpenCLIP bigG): CLIPTextModelWithProjection, text_encoder_2 of SDXL.

The pipelines take its last but one hidden state and its projected pooled output, and of CLIP-L beside it the last but
one hidden state (diffusers, pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py, encode_prompt); so does the
host (comfy/sdxl_clip.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .... import host
from ....host.texts import Text
from ...errors import CheckpointError
from ...files.source import Source, read_json
from . import clip_l
from .base import Encoder, Family

# comfy/clip_config_bigg.json
SIZES = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "max_position_embeddings": 77, "hidden_act": "gelu"}
KNOWN_BY = 31  # layers: the host tells it from CLIP-L by its 31st (comfy/sd.py, detect_te_model)


def host_config(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that differ from CLIP-G's. Raises CheckpointError for what the host has fixed: what clip_l names, a
    projection as wide as the model, 31 layers at least."""
    depth = config.get("num_hidden_layers", SIZES["num_hidden_layers"])
    if depth < KNOWN_BY:
        raise CheckpointError(Text("ComfyUI knows CLIP-G by its {known} layers or more, this one has {layers}",
                                   known=KNOWN_BY, layers=depth),
                              "config.json", Text("use the base's own text encoder"))
    return clip_l.sizes_of(config, SIZES, {"projection_dim": config.get("hidden_size", SIZES["hidden_size"])})


def repair(tokenizer: Any, source: Source) -> str:
    """Let the host's tokenizer pad with the folder's token: of SDXL it is "!", number 0, which the host has fixed, but
    there are folders with another, and what is padded with is read, too (nothing is masked)."""
    files = [Path(source.folder, name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    given = [read_json(str(file)).get("pad_token") for file in files if file.is_file()]
    token = next((token["content"] if isinstance(token, dict) else token for token in given if token), "")
    if not host.pad_with(tokenizer, token):
        return ""
    return Text("CLIP-G's prompts are padded with {token} as the base's tokenizer says (ComfyUI: !)", token=token)


# The projection is there: one made up in its place would be other numbers.
CLIP_G = Encoder("CLIP-G", ("CLIPTextModelWithProjection",), "clip_g", clip_l.KNOWN, clip_l.CALLED,
                 partial(clip_l.modules, sizes=SIZES, projected=True), host_config, clip_l.tokenizer, repair=repair)
PIPELINES = ("StableDiffusionXL",)
FAMILIES = (
    Family("SDXL", "STABLE_DIFFUSION", (("text_encoder", "tokenizer", clip_l.CLIP_L),
                                        ("text_encoder_2", "tokenizer_2", CLIP_G)), "SDXLClipModel", PIPELINES),
    Family("SDXL refiner", "STABLE_DIFFUSION", (("text_encoder_2", "tokenizer_2", CLIP_G),), "SDXLRefinerClipModel",
           PIPELINES))

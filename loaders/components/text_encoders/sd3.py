"""Stable Diffusion 3 and 3.5: CLIP-L and CLIP-G, both with a projection, and T5 XXL, any of which a base may lack.

The pipelines take the last but one hidden states of both CLIPs beside each other, those of T5 behind them, and both
projected pooled outputs (diffusers, pipelines/stable_diffusion_3). The host does the same but for CLIP-L's projection,
which it leaves out (comfy/text_encoders/sd3_clip.py): in the published folders it is the identity.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from ....host.texts import Text
from ...errors import CheckpointError
from . import clip_g, clip_l, t5
from .base import Family

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 256  # tokens of a prompt for T5 in diffusers; the host pads to 77
NOTE = Text("T5 prompts are padded to 256 tokens as diffusers does (ComfyUI's own loaders: 77); T5TokenizerOptions "
            "changes it")
WITHOUT = Text("a text encoder that the base lacks is left out, as in ComfyUI; diffusers puts zeros in its place")


def without_projection(tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError for a projection other than the identity, which the host would leave out."""
    import torch

    weight = tensors.get("text_projection.weight")
    if weight is not None and weight.is_floating_point() and weight.ndim == 2 \
            and not torch.equal(weight.float(), torch.eye(weight.shape[0], weight.shape[1])):
        raise CheckpointError(Text("CLIP-L's text_projection is not the identity, and ComfyUI's Stable Diffusion 3 "
                                   "leaves it out"), "text_encoder", Text("use the base's own text encoder"))


PROJECTED = replace(clip_l.CLIP_L, classes=("CLIPTextModelWithProjection",),
                    modules=partial(clip_l.modules, projected=True))
CLIP_L = replace(PROJECTED, complete=without_projection)
ENCODERS = (("text_encoder", "tokenizer", CLIP_L), ("text_encoder_2", "tokenizer_2", clip_g.CLIP_G),
            ("text_encoder_3", "tokenizer_3", t5.T5_XXL))


def families() -> tuple[Family, ...]:
    """One for each choice of encoders, the whole first."""
    return tuple(Family("Stable Diffusion 3", "SD3", chosen, "SD3ClipModel", ("StableDiffusion3",),
                        (("t5xxl_min_length", LENGTH),) if ENCODERS[2] in chosen else (),
                        NOTE if len(chosen) == len(ENCODERS) else WITHOUT)
                 for count in (3, 2, 1) for chosen in combinations(ENCODERS, count))


FAMILIES = families()

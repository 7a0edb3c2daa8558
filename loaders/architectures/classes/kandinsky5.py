"""Kandinsky 5, video and image (comfy/ldm/kandinsky5/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....host.texts import Text
from ..derived import Derived

IMAGE, WIDE = 2560, 4096  # the widths that comfy/model_detection.py has positions of its own for


def _others(config: Mapping[str, Any]) -> str:
    """ComfyUI tells by the width what the axes are, and which model is for images; one for videos it gives a picture
    and a mask beside the latents (comfy/model_detection.py, Kandinsky5 in comfy/model_base.py)."""
    width, axes, given = config.get("model_dim"), config.get("axes_dims"), config.get("visual_cond")
    known = [32, 48, 48] if width in (IMAGE, WIDE) else [16, 24, 24]
    if width and axes and list(axes) != known:
        return Text("ComfyUI runs a Kandinsky 5 of width {width} with rotary axes {known} only; config.json says "
                    "{axes}", width=width, known=known, axes=list(axes))
    if width and given is not None and bool(given) is (width == IMAGE):
        return Text("ComfyUI runs a Kandinsky 5 of width {image} from text alone, and of any other with a picture "
                    "beside the latents; config.json says {width} and visual_cond {given}", image=IMAGE, width=width,
                    given=bool(given))
    return ""


CLASS = Derived(
    title="Kandinsky 5", hosts=("Kandinsky5", "Kandinsky5Image"), table="kandinsky5",
    classes=("Kandinsky5Transformer3DModel",),
    marks=("visual_transformer_blocks.0.cross_attention.key_norm.", "pooled_text_embeddings.", "text_embeddings."),
    fixed={
        "in_visual_dim": (16,), "out_visual_dim": (16,), "in_text_dim": (3584,), "in_text_dim2": (768,),
        "patch_size": ((1, 2, 2),),
    },
    # attention: diffusers' pipeline may leave out what counts little ("nabla"), its class and ComfyUI do not
    free=frozenset({
        "time_dim", "model_dim", "ff_dim", "num_text_blocks", "num_visual_blocks", "axes_dims", "visual_cond",
        *(f"attention_{what}" for what in ("type", "causal", "local", "glob", "window", "P", "wT", "wW", "wH",
                                           "add_sta", "method")),
    }),
    refuses=_others,
)

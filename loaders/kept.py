"""Keep Weights Decoded: a MODEL that takes free memory for speed while it samples (quant/kept.py)."""

from __future__ import annotations

from typing import Any

from .. import host
from ..host.texts import Text, joined
from .words import size

TOKENS = 4096  # of a picture of 1024 x 1024: what a report is about


def apply(model: Any, most: float = 0.0) -> tuple[Any, str]:
    """(a clone of a MODEL that keeps decoded weights of at most so many GB, 0 for what is free; report of what there is
    to keep, and room for, now). `model` is not changed."""
    import torch

    from ..quant import kept

    host.require("keeping decoded weights")
    bytes_most = round(most * 1e9)
    patcher = model.clone()
    kept.attach(patcher, bytes_most)
    like = torch.empty(TOKENS, 0, dtype=model.model.get_dtype_inference(), device=model.load_device)
    every = list(kept.layers(model))
    decoded = [layer for layer in every if kept.can_keep(layer, like)]
    lines: list[str] = [
        Text("{count} of {total} quantized layers are decoded for every product; kept decoded they take {size}",
             count=len(decoded), total=len(every), size=size(sum(kept.size_of(layer, like) for layer in decoded)))]
    if not every:
        lines.append(Text("only layers that a loader of this pack has quantized are"))
    elif len(decoded) < len(every):
        lines.append(Text("the others are left alone: they are multiplied by their codes, or their weight is changed "
                          "before"))
    lines.append(Text("free on {device} beside what is kept for everything else: {size} now; it is asked again before "
                      "every step", device=host.device_name(), size=size(max(0, host.spare_memory(model.load_device)))))
    if bytes_most:
        lines.append(Text("at most {size} of it, as chosen", size=size(bytes_most)))
    if model.is_dynamic():
        lines.append(Text("note: ComfyUI's dynamic VRAM streams the weights of this MODEL, and none of those are kept; "
                          "start ComfyUI with --disable-dynamic-vram"))
    return patcher, joined("\n", lines)

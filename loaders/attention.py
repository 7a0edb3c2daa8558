"""Attention preferences: which attention kernel a module of the model asks for.

`<module>.comfy_attention.config` is U8 JSON, {"attention": "comfy_kitchen_int8"} or a list of such in order of
preference; ComfyUI takes it since about 0.38 (QUANTIZATION.md, "Diffusion attention preferences"). Like `comfy_quant`
it is no weight. Its module path is ComfyUI's own, so it can be placed in natively named files only.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from ..host import PREFERENCE
from ..host.texts import Text
from .files.strict import decode
from .words import first_ten

if TYPE_CHECKING:
    from torch import Tensor

    from .architectures import Naming
    from .containers.checkpoint import Checkpoint
    from .description import CheckpointDescription


def note(description: CheckpointDescription, checkpoint: Checkpoint) -> None:
    """Say which kernels are asked for; what is no such preference becomes a problem, for ComfyUI stumbles on it."""
    asked: dict[str, list[str]] = {}
    for name, info in checkpoint.preferences.items():
        try:
            kernels = _kernels(decode(checkpoint.read(name))) if info.dtype == "U8" else ""
        except ValueError:
            kernels = ""
        if kernels:
            asked.setdefault(kernels, []).append(name.removesuffix(PREFERENCE))
        else:
            description.problems.append(Text("{name} is no attention preference (U8 with a JSON object)", name=name))
    for kernels, modules in asked.items():
        text = Text("attention preferences: {kernels} in {count} modules ({modules})", kernels=kernels,
                    count=len(modules), modules=first_ten(modules))
        if description.naming.style != "native":
            text = Text("{text}; left out, because in {style} names modules are called otherwise", text=text,
                        style=description.naming.style)
        description.notes.append(text)


def tensors(checkpoint: Checkpoint, naming: Naming) -> dict[str, Tensor]:
    """The preferences under native names, with their bytes; none where they cannot be placed."""
    import torch

    return {name.removeprefix(naming.prefix): torch.frombuffer(bytearray(checkpoint.read(name)), dtype=torch.uint8)
            for name in (checkpoint.preferences if naming.style == "native" else ())}


def _kernels(conf: Any) -> str:
    """The kernels that a preference names, in words; empty for what is none."""
    wanted = conf if isinstance(conf, list) else [conf]
    if not wanted or not all(isinstance(one, dict) for one in wanted):
        return ""
    names: list[str] = [str(one.get("attention", "")) or Text("none named") for one in wanted]
    return reduce(lambda some, other: Text("{some} or {other}", some=some, other=other), names)

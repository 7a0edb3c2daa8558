"""The host's `comfy_quant` markers: JSON beside a layer's tensors that names its format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..host.texts import Text

if TYPE_CHECKING:
    from torch import Tensor


def full_precision_marker(name: str, part: dict[str, Tensor], formats: tuple[str, ...]) -> bool:
    """Whether a stored Comfy marker asks for full-precision matmul. Raises ValueError if it names another format."""
    stored = part.get("comfy_quant")
    if stored is None:
        return False
    try:
        conf = json.loads(stored.cpu().numpy().tobytes())
        assert isinstance(conf, dict)
    except (ValueError, RecursionError, AssertionError) as error:
        raise ValueError(Text("{name}.comfy_quant is no JSON", name=name)) from error
    if conf.get("format") not in formats:
        raise ValueError(Text("{name}.comfy_quant says format {declared!r} but the weight is {format}", name=name,
                              declared=conf.get("format"), format=formats[0]))
    return bool(conf.get("full_precision_matrix_mult"))


def marker(conf: dict[str, Any]) -> Tensor:
    """A `comfy_quant` tensor: the JSON of `conf` as U8, as the host stores it."""
    import torch

    return torch.frombuffer(bytearray(json.dumps(conf).encode()), dtype=torch.uint8)

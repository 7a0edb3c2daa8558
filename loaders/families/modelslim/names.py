"""Tensor names of msmodelslim's exports, on top of the architecture's own (original or diffusers').

A smoothed layer is a wrapper around two modules: the weights are in `<layer>.linear`, the smoothing vector is
`<layer>.div.mul_scale`. SGLang's repack tool strips both words. Rotations and scales of quantized attention are left
out by name: they make q and k easier to quantize, (qR)(kR)^T = qk^T, and no Linear weight is rotated
(docs/sources/ascend.md, "Extra tensors").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ....host.texts import Text
from ...errors import CheckpointError
from ...words import first_ten

ROTATION = re.compile(r"(^|\.)(to_)?[qk]_rot$")
ATTENTION = re.compile(r"(^|\.)fa3?_[qkv]\.(scale|offset)$")
JSON_ONLY = re.compile(r"(^|\.)quant_type$")
_SMOOTHED = ".div.mul_scale"
T = TypeVar("T")


def plain_names(tensors: Mapping[str, T], where: str) -> tuple[dict[str, T], dict[str, str], list[str]]:
    """Stored tensors -> (by plain name, plain name -> stored name, stored names only quantized attention reads).

    Raises CheckpointError when two stored names mean one tensor.
    """
    smoothed = {name.removesuffix(_SMOOTHED) for name in tensors if name.endswith(_SMOOTHED)}
    named: dict[str, T] = {}
    stored: dict[str, str] = {}
    ignored, twice = [], []
    for name, tensor in tensors.items():
        if ROTATION.search(name) or ATTENTION.search(name):
            ignored.append(name)
            continue
        plain = name
        module, _, leaf = name.rpartition(".")
        layer, _, wrapped = module.rpartition(".")
        if layer in smoothed and wrapped in ("linear", "div"):
            plain = f"{layer}.{leaf}"
        if plain in named:
            twice += [stored[plain], name]
        named[plain], stored[plain] = tensor, name
    if twice:
        raise CheckpointError(Text("two stored tensors mean the same one: {names}", names=first_ten(twice)), where,
                              Text("the folder mixes two exports; copy it again"))
    return named, stored, ignored

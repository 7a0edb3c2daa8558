"""Scales of ggml's blocks that are no numbers. They lie among the codes: looking at them reads the whole weight.

Which bytes those are is ggml's own check (ggml-quants.c, ggml_validate_row_data; llama.cpp's --check-tensors, which is
off by default): F16 that is NaN or infinite, an E8M0 of 255. They may be negative, and NVFP4's may be any byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scales import INFINITE, NAN
from . import Type

# Where a block has F16: d, and the minimum behind it or after the scales.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,)}
EXPONENT = {"MXFP4": 0}
NIBBLES = {"IQ1_M": 48}  # four words, each of which has a nibble of the F16 on top, the lowest first
AT_ONCE = 1 << 15  # blocks that stay in a core's cache


def damage(codes: Tensor, kind: Type) -> str:
    """What scales of blocks U8 [rows, bytes of a row] hold that is no number, in words; empty for nothing."""
    blocks = codes.reshape(-1, kind.size)
    if blocks.device.type != "cpu":
        return _anywhere(blocks, kind.name)
    top = 0
    for words in _words(blocks.numpy(), kind.name):
        for first in range(0, len(words), AT_ONCE):
            top = max(top, int((words[first:first + AT_ONCE] & 0x7FFF).max()))
    return _said(top)


def _said(top: int) -> str:
    """Of the largest magnitude, as the bits of an F16."""
    return "" if top < 0x7C00 else INFINITE if top == 0x7C00 else NAN


def _words(blocks: Any, name: str) -> list[Any]:
    """The F16 of numpy's blocks as words [count], and E8M0 as such."""
    import numpy as np

    def word(at: int) -> Any:
        return blocks[:, at:at + 2].view(np.uint16)[:, 0]

    if name in EXPONENT:
        return [np.where(blocks[:, EXPONENT[name]] == 255, np.uint16(0x7FFF), np.uint16(0))]
    if name in NIBBLES:
        parts = [word(NIBBLES[name] + 2 * i) >> 12 << 4 * i for i in range(4)]
        return [parts[0] | parts[1] | parts[2] | parts[3]]
    return [word(at) for at in HALVES.get(name, ())]


def _anywhere(blocks: Tensor, name: str) -> str:
    """The same on any device, which is waited for once."""
    if name in EXPONENT:
        top = torch.where(blocks[:, EXPONENT[name]] == 255, 0x7FFF, 0)
    elif name in NIBBLES:
        at = NIBBLES[name]
        high = blocks[:, at + 1:at + 8:2].int() >> 4
        top = (high << torch.arange(0, 16, 4, dtype=torch.int32, device=blocks.device)).sum(1)
    elif name in HALVES:
        pairs = torch.stack([blocks[:, at:at + 2] for at in HALVES[name]], 1).int()
        top = pairs[..., 0] | pairs[..., 1] << 8
    else:
        return ""
    return _said(int((top & 0x7FFF).max()))

"""Scales of an export that mean nothing: what is copied byte for byte is not to be copied then.

Without torch, as all of the repack: a float's bits without the sign order as its magnitude does.
"""

from __future__ import annotations

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...quant.ascend.schemes import SCHEMES
from ...quant.scales import EXPONENTS, FINITE, INFINITE, NAN, NEGATIVE, NOT_NEGATIVE, POSITIVE, ZEROS, refusal
from .expert import Expert

RULES = {"weight_scale": POSITIVE, "deq_scale": POSITIVE, "input_scale": POSITIVE, "weight_dual_scale": NOT_NEGATIVE,
         "weight_offset": FINITE, "mul_scale": FINITE}
# Words of a dtype, and infinity in them; deq_scale in I64 is an F32 in the low half (docs/sources/ascend.md).
WORDS = {"F32": ("<u4", 0x7F800000), "I64": ("<i8", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


def refuse_damaged(expert: Expert) -> None:
    """Raise CheckpointError for the first tensor with numbers that no layer of its type has; one at a time, and of
    those alone is anything read."""
    for name, info in expert.checkpoint.tensors.items():
        leaf = name.rpartition(".")[2]
        scheme = SCHEMES.get(expert.entries.get(name, ""))
        if leaf not in RULES or scheme is not None and leaf in scheme.unneeded:
            continue
        rule = EXPONENTS if leaf == "weight_scale" and info.dtype in ("U8", "F8_E8M0") else RULES[leaf]
        if found := damage(expert.checkpoint.read(name), info.dtype, rule):
            raise CheckpointError(refusal(name, found, rule), expert.folder,
                                  Text("copy the export again, or report it to its publisher"))


def damage(raw: bytes, dtype: str, rule: str) -> str:
    """What the bytes of a tensor hold that a rule forbids, as quant.scales.damage says it."""
    import numpy as np

    if rule == EXPONENTS:
        return NAN if b"\xff" in raw else ""
    if dtype not in WORDS or not raw:
        return ""
    word, infinity = WORDS[dtype]
    bits = np.frombuffer(raw, word).astype("<u4" if word == "<i8" else word)
    sign = 1 << 8 * bits.itemsize - 1
    top, low = int((bits & (sign - 1)).max()), int((bits & (sign - 1)).min())
    if top >= infinity:
        return NAN if top > infinity else INFINITE
    if rule == FINITE:
        return ""
    return NEGATIVE if int(bits.max()) > sign else ZEROS if rule == POSITIVE and not low else ""

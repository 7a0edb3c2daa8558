"""Codes in 32-bit words, and what formats of packed integers check alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..stored import PLAIN_DTYPES, Leaves

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
FLOATS = tuple(sorted(PLAIN_DTYPES))


def unpack(words: Tensor, bits: int, axis: int, *, across: bool = False) -> Tensor:
    """I32 words -> codes U8, those of a word one after the other along `axis`, the lowest bits first.

    A word holds 32 // bits codes; with `across` they run on into the next word (GPTQ's 3 bits).
    """
    import torch

    words = words.movedim(axis, -1)
    count = words.shape[-1] * WORD // bits if across else WORD // bits
    codes = []
    for i in range(WORD if across else count):  # codes repeat after 32 / gcd(32, bits) of them
        word, shift = divmod(bits * i, WORD)
        part = words[..., word::bits] if across else words
        code = part >> shift & (1 << min(bits, WORD - shift)) - 1
        if shift + bits > WORD:
            code |= (words[..., word + 1::bits] & (1 << shift + bits - WORD) - 1) << WORD - shift
        codes.append(code.to(torch.uint8))
    return torch.stack(codes, -1).flatten(-2).movedim(-1, axis)


class IntegerFormat:
    """What the formats of packed integers have in common: as a `stored.StoredFormat`, without `matches`, which are told
    by their files' configuration. `bits` of a code."""

    colour = (150, 120, 70)
    words: frozenset[str] = frozenset()

    def __init__(self, bits: int, *companions: str) -> None:
        kept = 4 if bits <= 4 else 8
        self.bits, self.codec, self.name = bits, f"u{kept}_groups", f"UINT{kept} (groups)"
        self.companions = frozenset(companions)

    def matches(self, leaves: Leaves) -> bool:
        """Never: bytes alone do not tell."""
        return False


def shapes_problem(leaves: Leaves, wanted: Mapping[str, tuple[str | tuple[str, ...], tuple[int, ...]]]) -> str:
    """What is wrong with a layer's tensors: leaf -> (dtypes, shape), and only those that are there are looked at."""
    for leaf, (dtypes, shape) in wanted.items():
        found = leaves.get(leaf)
        if found is None:
            continue
        if found.dtype not in (dtypes := (dtypes,) if isinstance(dtypes, str) else dtypes):
            return f"{leaf} is {found.dtype}, expected {' or '.join(dtypes)}"
        if tuple(found.shape) != shape:
            return f"{leaf} is {list(found.shape)}, expected {list(shape)}"
    return ""

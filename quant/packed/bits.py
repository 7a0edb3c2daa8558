"""Codes in 32-bit words, and what formats of packed integers check alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...host.texts import Text, either
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
    count = WORD if across else WORD // bits  # codes repeat after 32 / gcd(32, bits) of them
    if bits == 8:
        return words.contiguous().view(torch.uint8).movedim(-1, axis)
    first = words[..., ::bits] if across else words
    codes = torch.empty(*first.shape, count, dtype=torch.uint8, device=words.device)
    for i in range(count):
        word, shift = divmod(bits * i, WORD)
        part = words[..., word::bits] if across else words
        code = part >> shift & (1 << min(bits, WORD - shift)) - 1
        if shift + bits > WORD:
            code |= (words[..., word + 1::bits] & (1 << shift + bits - WORD) - 1) << WORD - shift
        codes[..., i] = code
    return codes.flatten(-2).movedim(-1, axis)


def kept_bytes(words: Tensor, bits: int) -> Tensor | None:
    """I32 words [rows, words of a row], the lowest bits first, as a tile keeps their codes: U8 [rows, bytes], two codes
    of 2 or 4 bits a byte or one of 8, in views where the words lie so; None for other numbers of bits."""
    import torch

    if bits not in (2, 4, 8):
        return None
    data = words.contiguous().view(torch.uint8)
    if bits != 2:
        return data
    wide = torch.empty(*data.shape, 2, dtype=torch.uint8, device=data.device)
    wide[..., 0] = data & 3 | (data & 12) << 2
    wide[..., 1] = data >> 4 & 3 | data >> 6 << 4
    return wide.flatten(1)


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
            return Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=found.dtype,
                        expected=either(dtypes))
        if tuple(found.shape) != shape:
            return Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=list(found.shape),
                        expected=list(shape))
    return ""

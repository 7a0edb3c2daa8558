"""Weights -> NVFP4 in ModelOpt's byte order (quant/codecs/nvfp4.py says how it is stored).

The arithmetic is that of nvidia-modelopt's NVFP4QTensor, byte for byte (tested against it):

    scale_2 = amax / 2688                                     F32
    block   = e4m3(clamp(blockamax / (6 * scale_2), 2^-9, 448)), 1 for a block of zeros
    code    = e2m1(w / (block * scale_2)), ties to even, the sign that of the quotient

comfy-kitchen's quantize_nvfp4 divides in another order, stores 0 for blocks of zeros and keeps the sign of -0.

Weights are not divided: bits of magnitudes order as the magnitudes do, so a weight's own bits tell its code by where
codes begin for its block scale (nvfp4_bounds.py). Even and odd columns lie apart meanwhile: what is looked up for a
group is in the order of its pairs, and codes come out as the low and the high halves of bytes in order.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from .nvfp4_bounds import GROUP, PAIRS, Bounds, block_scales, bounds_of

if TYPE_CHECKING:
    from torch import Tensor

MAX = 6.0 * 448.0
BLOCK = 1 << 17  # weights worked on at a time: what is made of them stays in a core's cache


def scale_of(amax: float) -> Tensor:
    """The F32 scale [] of a tensor whose largest magnitude is `amax`: amax / 2688, 1 for a tensor of zeros."""
    import torch

    return (torch.tensor(amax or MAX, dtype=torch.float32) / MAX).clamp_(min=2.0 ** -149)


def quantize(weight: Tensor, scale_2: Tensor, codes: Tensor | None = None,
             blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(U8 [rows, columns / 2], E4M3 [rows, columns / 16]) of a float weight [rows, columns], finite and on the CPU.

    Columns are padded with zeros to a multiple of 16. `codes` and `blocks` are filled when they are given.
    """
    import torch

    if weight.shape[-1] % GROUP:
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % GROUP))
    if weight.dtype not in (torch.bfloat16, torch.float16):
        weight = weight.float()
    rows, columns = weight.shape
    bounds = bounds_of(float(scale_2), weight.dtype)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8) if codes is None else codes
    blocks = torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn) if blocks is None else blocks
    stored, code = weight.reshape(-1).view(torch.uint8).numpy().view(bounds.word), codes.view(-1).numpy()
    block = blocks.view(-1).view(torch.uint8).numpy()
    for start in range(0, len(stored), BLOCK):
        end = min(start + BLOCK, len(stored))
        _quantize_block(stored[start:end], bounds, code[start // 2:end // 2], block[start // GROUP:end // GROUP])
    return codes, blocks


def _quantize_block(stored: Any, bounds: Bounds, codes: Any, blocks: Any) -> None:
    """Bits of weights of whole groups -> their codes, two a byte, and E4M3 block scales."""
    import numpy as np

    sizes, odd, bound, nibbles, reached, low, within, index = _memory(len(stored), bounds.word)
    bits = 8 * bounds.word.itemsize
    pairs = stored.view(odd.dtype)  # an even column and an odd one
    np.copyto(sizes[0], pairs, casting="unsafe")
    np.copyto(sizes[1], np.right_shift(pairs, bits, out=odd), casting="unsafe")
    np.greater(sizes, 1 << bits - 1, out=nibbles.view(bool))  # below zero; -0 is not
    sizes <<= 1
    _block_scales(sizes, bounds, bound, odd, index, blocks)
    np.copyto(index, blocks)
    if bounds.nonzero is not None:
        nibbles &= _reached(sizes, bounds.nonzero, index, bound, reached)
    nibbles *= 8
    regular = bounds.regular[0] <= blocks.min() and blocks.max() <= bounds.regular[1]
    for table in bounds.codes[:2 if regular else 7]:
        nibbles += _reached(sizes, table, index, bound, reached)
    if regular:  # codes 3, 5 and 7 begin an octave apart, so do 4 and 6: two steps an octave from there on
        bounds.octave.take(index, out=bound.view(bounds.octave.dtype), mode="wrap")
        np.maximum(sizes, bound, out=sizes)
        sizes -= bound
        np.copyto(low, sizes, casting="unsafe")  # the place in an octave, which is 256 here
        nibbles += _reached(low, bounds.within, index, within, reached)
        sizes >>= 8
        np.copyto(low, sizes, casting="unsafe")  # the octave
        nibbles += low
        nibbles += low
    even, upper = nibbles
    upper *= 16
    np.add(even, upper, out=codes)


def _block_scales(sizes: Any, bounds: Bounds, largest: Any, spare: Any, index: Any, blocks: Any) -> None:
    """The scales of all groups, by their largest magnitude."""
    import numpy as np
    import torch

    np.maximum(sizes[0], sizes[1], out=largest)
    words, folded, shift = largest.view(np.uint64), spare.view(np.uint64)[:largest.nbytes // 8], 32
    while shift >= 8 * largest.itemsize:  # to the lowest of the numbers in a word of 64 bits
        np.right_shift(words, shift, out=folded)
        np.maximum(largest, folded.view(largest.dtype), out=largest)
        shift //= 2
    top = largest[::PAIRS]
    for at in range(8 // largest.itemsize, PAIRS, 8 // largest.itemsize):
        top = np.maximum(top, largest[at::PAIRS])
    top >>= 1
    if bounds.blocks is None:
        found = block_scales(torch.from_numpy(top.view(np.int32)).view(torch.float32), bounds.scale_2)
        np.copyto(blocks, found.view(torch.uint8).numpy())
    else:
        np.copyto(index, top)
        bounds.blocks.take(index, out=blocks, mode="wrap")


def _reached(sizes: Any, table: Any, index: Any, bound: Any, reached: Any) -> Any:
    """1 where a magnitude has reached the bound that a table has for its group, else 0."""
    import numpy as np

    table.take(index, out=bound.view(table.dtype), mode="wrap")  # "raise", the default, goes through a buffer
    np.greater_equal(sizes, bound, out=reached.view(bool))
    return reached


class _Local(threading.local):
    """This thread's memory for a block: fresh pages would cost more than what is done in them."""

    made: tuple[tuple[int, Any], tuple[Any, ...]] | None = None


_LOCAL = _Local()


def _memory(count: int, word: Any) -> tuple[Any, ...]:
    """Arrays for `count` weights, as even and odd columns where there are two rows: magnitudes, pairs of bits, bounds,
    codes, comparisons, low bytes, bounds of those, and places in a table. Pairs lie where comparisons and low bytes do
    later."""
    import numpy as np

    if _LOCAL.made is None or _LOCAL.made[0] != (count, word):
        half = count // 2
        odd = np.empty(half, f"u{2 * word.itemsize}")
        spare = odd.view(np.uint8)
        _LOCAL.made = (count, word), (
            np.empty((2, half), word), odd, np.empty(half, word), np.empty((2, half), np.uint8),
            spare[:count].reshape(2, half), spare[-count:].reshape(2, half), np.empty(half, np.uint8),
            np.empty(half // PAIRS, np.intp))
    return _LOCAL.made[1]

"""Weights -> NVFP4 in ModelOpt's byte order (quant/codecs/nvfp4.py says how it is stored).

The arithmetic is that of nvidia-modelopt's NVFP4QTensor, byte for byte (tested against it):

    scale_2 = amax / 2688                                     F32
    block   = e4m3(clamp(blockamax / (6 * scale_2), 2^-9, 448)), 1 for a block of zeros
    code    = e2m1(w / (block * scale_2)), ties to even, the sign that of the quotient

comfy-kitchen's quantize_nvfp4 divides in another order, stores 0 for blocks of zeros and keeps the sign of -0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blocks import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
MAX = 6.0 * 448.0
# Midpoints between neighbouring E2M1 magnitudes; at one of the second kind the even code is the upper one.
_ABOVE, _FROM = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)


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
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8) if codes is None else codes
    blocks = torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn) if blocks is None else blocks
    for part, code, block in zip(weight.reshape(-1).split(BLOCK), codes.view(-1).split(BLOCK // 2),
                                 blocks.view(-1).split(BLOCK // GROUP), strict=True):
        _quantize_block(part.view(-1, GROUP), scale_2, code, block)
    return codes, blocks


def _quantize_block(part: Tensor, scale_2: Tensor, code: Tensor, block: Tensor) -> None:
    import numpy

    values = part.float()
    scale = values.abs().amax(-1).div_(6.0 * scale_2)
    scale[scale == 0] = 1.0
    block.copy_(scale.clamp_(2.0 ** -9, 448.0))
    numbers = values.div_((block.float() * scale_2)[:, None]).view(-1).numpy()
    nibbles = numpy.less(numbers, 0).view(numpy.uint8)  # numpy compares ten times as fast as torch does
    nibbles <<= 3
    numpy.abs(numbers, out=numbers)
    above = numpy.empty(numbers.shape, bool)
    for bound in _ABOVE:
        nibbles += numpy.greater(numbers, bound, out=above).view(numpy.uint8)
    for bound in _FROM:
        nibbles += numpy.greater_equal(numbers, bound, out=above).view(numpy.uint8)
    packed = numpy.left_shift(nibbles[1::2], 4, out=code.numpy())
    packed |= nibbles[::2]

"""Scales as they are stored: which numbers they may be; of integers and FP8, which shapes there are, and row by row.

A number that no writer of a format stores is damage, and would be noise or a black picture. What writers store is a
rule, said where a format's tensors are (codecs.base.Field, host_formats.Field): FINITE where scales have a sign (the
largest value over the lowest code: ggml's, and AutoRound's in GPTQ's and AWQ's layouts), and for zero points, minima,
shifts and factors; NOT_NEGATIVE where they are a largest magnitude or a range over a code, which is 0 in a block of
zeros; POSITIVE where a writer keeps them above 0; EXPONENTS for E8M0.

Sizes of blocks are powers of two, and the last ones may be smaller, so shapes tell them: of `count` blocks over `size`
values each has as many as the smallest power of two that is no less than size / count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..host.texts import Text

if TYPE_CHECKING:
    from torch import Tensor

FINITE, NOT_NEGATIVE, POSITIVE, EXPONENTS = "finite", "not_negative", "positive", "exponents"
EXPECTED = {FINITE: Text("finite numbers"), NOT_NEGATIVE: Text("finite numbers from 0 on"),
            POSITIVE: Text("finite positive numbers"), EXPONENTS: Text("exponents (bytes up to 254)")}
NAN, INFINITE, NEGATIVE, ZEROS = Text("NaN"), Text("infinite values"), Text("negative values"), Text("zeros")


def damage(tensor: Tensor, rule: str) -> str:
    """What a tensor of any float dtype (with EXPONENTS, of bytes) holds that a rule forbids, in words; empty for
    nothing. One pass over its bytes, and no copy of them where nothing is found. Other integers are all right."""
    import torch

    if not tensor.numel():
        return ""
    if rule == EXPONENTS:
        return NAN if int(tensor.view(torch.uint8).max()) == 255 else ""
    if tensor.dtype == torch.float8_e4m3fn:  # NaN is the largest magnitude, and there is no infinity
        low, high = (int(end) for end in torch.aminmax(tensor.view(torch.uint8)))
        if high < 0x7F and (low or rule != POSITIVE):  # no NaN, and no sign
            return ""
        tensor = tensor.float()
    if not tensor.is_floating_point():
        return ""
    least, most = (float(end) for end in torch.aminmax(tensor))  # NaN where a value is
    if math.isnan(least):
        return NAN
    if math.isinf(least) or math.isinf(most):
        return INFINITE
    if rule == FINITE or least > 0:
        return ""
    return NEGATIVE if least < 0 else ZEROS if rule == POSITIVE else ""


def refusal(name: str, found: str, rule: str) -> str:
    """What to say of `damage` in the tensor of this name."""
    return Text("{name} holds {found}, expected {expected}", name=name, found=found, expected=EXPECTED[rule])


def checked(name: str, tensor: Tensor, rule: str) -> Tensor:
    """The tensor. Raises ValueError for what the rule forbids; `name` is the tensor's."""
    if found := damage(tensor, rule):
        raise ValueError(refusal(name, found, rule))
    return tensor


def block_of(size: int, count: int) -> int:
    """How many values each of `count` blocks over `size` values has, but for the last one; all for one block."""
    return size if count == 1 else 1 << (-(-size // count) - 1).bit_length()


def shape_problem(shape: tuple[int, ...], rows: int, columns: int) -> str:
    """What is wrong with a scale of this shape for a [rows, columns] weight: it is one value, one a row ([rows] or
    [rows, 1]), or one a block ([blocks of rows, blocks of columns], possibly with a dimension of one behind each)."""
    if shape in ((), (1,), (1, 1), (rows,)):
        return ""
    cut = _blocks(shape)
    if len(cut) == 2 and all(cut) and all(
            count == -(-size // block_of(size, count)) for size, count in zip((rows, columns), cut, strict=True)):
        return ""
    return Text("the scale is {shape}, expected one value, one a row, or one a block of a power of two of rows and "
                "columns", shape=list(shape))


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a dimension of one behind the last (converters) or behind each (ModelOpt's FP8_PB_WO)."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[::2]
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def positive(name: str, scale: Tensor) -> Tensor:
    """A scale in F32. Raises ValueError for values that are not finite and positive; `name` is the tensor's."""
    return checked(name, scale.float(), POSITIVE)


def by_row(name: str, scale: Tensor, rows: int) -> Tensor:
    """A stored scale of a right shape -> F32 [rows, blocks of a row]. Raises ValueError for values that are not finite
    and positive; `name` is the tensor's."""
    scale = positive(name, scale)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1).contiguous()
    if scale.ndim == 1:
        return scale.reshape(rows, 1)
    scale = scale.reshape(_blocks(tuple(scale.shape)))
    if scale.shape[0] == rows:
        return scale
    return scale.repeat_interleave(block_of(rows, scale.shape[0]), 0)[:rows].contiguous()

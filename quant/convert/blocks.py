"""What both converters share: the size of a block, and the largest magnitude of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host.texts import Text

if TYPE_CHECKING:
    from torch import Tensor

# Elements that are worked on at a time: temporaries stay in the cache, and Python is asked rarely enough that threads
# over a tensor's spans do not wait for each other (32768: NVFP4 takes twice as long).
BLOCK = 262144


def largest(tensor: Tensor) -> float:
    """The largest magnitude of a float tensor (F32, F16, BF16 or E4M3; contiguous, on the CPU); 0 for an empty one.

    Raises ValueError when it holds NaN or infinity. Works on the bits: without the sign they order as the magnitudes
    do, so a signed maximum finds the largest positive value and an unsigned one the largest negative.
    """
    import numpy
    import torch

    if not tensor.numel():
        return 0.0
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits = tensor.reshape(-1).view(integer).numpy()
    mask = (1 << (8 * tensor.element_size() - 1)) - 1
    top = max(int(bits.max()), int(bits.view(f"u{bits.itemsize}").max()) & mask)
    value = float(torch.from_numpy(numpy.array([top], bits.dtype)).view(tensor.dtype).float())
    if value != value or value == float("inf"):
        raise ValueError(Text("holds infinite values") if value > 0 else Text("holds NaN"))
    return value

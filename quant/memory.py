"""Fresh memory for what cannot stay a view of a file.

Linux gives out 4 KB pages one by one, which takes four times as long as the copy into them; numpy asks for huge pages
where an array is large (numpy/_core/src/multiarray/alloc.c), torch does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype


def empty(shape: Sequence[int], dtype: dtype) -> Tensor:
    """A tensor on the CPU whose values are not set."""
    import numpy as np
    import torch

    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(*shape)


def cat(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """torch.cat."""
    import torch

    first = parts[0]
    if any(part.device.type != "cpu" or part.dtype != first.dtype for part in parts):
        return torch.cat(tuple(parts), axis)
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return torch.cat(tuple(parts), axis, out=empty(shape, first.dtype))

"""The host's order of 4-bit codes and block scales: the even column in the high nibble, scales in 128 x 4 tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the two E2M1 codes of every byte (0xAB -> 0xBA)."""
    swapped = codes << 4
    swapped |= codes >> 4
    return swapped


def swizzle(block: Tensor) -> Tensor:
    """Block scales [rows, columns] -> 128 x 4 tiles, padded with zeros: [ceil128(rows), ceil4(columns)]."""
    import torch
    from comfy_kitchen.float_utils import to_blocked

    return to_blocked(block.view(torch.uint8), flatten=False).view(block.dtype)


def linear_blocks(tiles: Tensor, rows: int, half: int) -> Tensor:
    """Block scales in 128 x 4 tiles -> [rows, columns / 16], for codes [rows, half of the columns]."""
    import torch
    from comfy_kitchen.float_utils import from_blocked

    return from_blocked(tiles.view(torch.uint8), rows, half // 8).contiguous().view(tiles.dtype)


def untiled(tiles: Tensor) -> Tensor:
    """The same with all rows and columns of the padding, of whole tiles on a CPU: four scales at a time, which takes a
    quarter of what comfy-kitchen's operation does."""
    import numpy as np
    import torch

    rows, columns = tiles.shape
    words = tiles.view(torch.uint8).numpy().view(np.uint32).reshape(rows // 128, columns // 4, 32, 4)
    found = np.ascontiguousarray(words.transpose(0, 3, 2, 1)).view(np.uint8)
    return torch.from_numpy(found.reshape(rows, columns)).view(tiles.dtype)


def pad_rows(data: Tensor) -> Tensor:
    """Pad with zero rows to a multiple of 16, as the host's NVFP4 layout stores it; a view when nothing is missing."""
    import torch

    missing = -data.shape[0] % 16
    return torch.nn.functional.pad(data, (0, 0, 0, missing)) if missing else data

"""The host's order of 4-bit codes and block scales: the even column in the high nibble, scales in 128 x 4 tiles."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .memory import empty

if TYPE_CHECKING:
    from torch import Tensor

CACHED = 1 << 18  # bytes that stay in a core's cache through several passes


def ceil_to(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def swap_nibbles(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Exchange the two E2M1 codes of every byte (0xAB -> 0xBA) of U8 codes, into `out`, which may be the codes."""
    import numpy as np
    import torch

    if codes.device.type != "cpu":
        swapped = (codes << 4).bitwise_or_(codes >> 4)
        return swapped if out is None else out.copy_(swapped)
    out = empty(codes.shape, torch.uint8) if out is None else out
    stored, made, upper = codes.contiguous().view(-1).numpy(), out.view(-1).numpy(), np.empty(CACHED, np.uint8)
    for at in range(0, len(stored), CACHED):
        part, into = stored[at:at + CACHED], made[at:at + CACHED]
        # by 16, because numpy shifts single bytes one after the other
        high = np.floor_divide(part, np.uint8(16), out=upper[:len(part)])
        swapped = np.multiply(part, np.uint8(16), out=into)
        swapped |= high
    return out


def swizzle(block: Tensor) -> Tensor:
    """Block scales [rows, columns] -> 128 x 4 tiles, padded with zeros: [ceil128(rows), ceil4(columns)].

    comfy-kitchen's to_blocked, on a CPU several times as fast.
    """
    import torch

    lanes, padding = block.view(torch.uint8), (0, -block.shape[1] % 4, 0, -block.shape[0] % 128)
    if lanes.device.type != "cpu":
        from comfy_kitchen.float_utils import to_blocked

        return to_blocked(lanes, flatten=False).view(block.dtype)
    lanes = torch.nn.functional.pad(lanes, padding) if any(padding) else lanes
    return look_up_rows(lanes, _places(lanes.shape[1] // 4, True)).view(block.dtype)


def linear_blocks(tiles: Tensor, rows: int, half: int) -> Tensor:
    """Block scales in 128 x 4 tiles -> [rows, columns / 16], for codes [rows, half of the columns]."""
    import torch

    lanes, columns = tiles.view(torch.uint8), half // 8
    if lanes.device.type != "cpu":
        from comfy_kitchen.float_utils import from_blocked

        return from_blocked(lanes, rows, columns).contiguous().view(tiles.dtype)
    lanes = lanes.reshape(ceil_to(rows, 128), ceil_to(columns, 4))
    made = look_up_rows(lanes, _places(lanes.shape[1] // 4, False))
    made = made if made.shape == (rows, columns) else made[:rows, :columns].contiguous()
    return made.view(tiles.dtype)


@lru_cache(maxsize=16)
def _places(tiles: int, to_tiles: bool) -> Any:
    """Where words of 4 scales lie in 128 rows of `tiles` x 4 scales, in order of what they become: row r of a tile is
    in it at r % 32, r // 32."""
    import numpy as np

    words = np.arange(128 * tiles).reshape((4, 32, tiles) if to_tiles else (tiles, 32, 4))
    return words.transpose(2, 1, 0).reshape(-1)


def look_up_rows(lanes: Tensor, places: Any) -> Tensor:
    """U8 on the CPU, its bytes as words of 4, of which every len(places) are put in another order: one pass, where
    permuting short axes takes several slow ones."""
    import numpy as np
    import torch

    words = lanes.contiguous().numpy().reshape(-1, 4 * len(places)).view(np.int32)
    return torch.from_numpy(words.take(places, 1).view(np.uint8)).view(lanes.shape)


def look_up(stored: Any, places: Any, out: Any) -> None:
    """out = stored[places], of contiguous numpy arrays as one dimension; the places must be there."""
    import numpy as np

    np.take(stored.reshape(-1), places, out=out.reshape(-1), mode="wrap")  # "raise", the default, goes through a buffer


def pad_rows(data: Tensor) -> Tensor:
    """Pad with zero rows to a multiple of 16, as the host's NVFP4 layout stores it; a view when nothing is missing."""
    import torch

    missing = -data.shape[0] % 16
    return torch.nn.functional.pad(data, (0, 0, 0, missing)) if missing else data

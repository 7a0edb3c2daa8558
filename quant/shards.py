"""Row shards: the rows that one stored layer gives to a native Linear, and what their formats share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


ROW_SHARDS = "qt.row_shards"  # this pack's marker; row_shards.py and ops.py implement it
HOST_FORMAT = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}
MAX_SHARDS = 4  # q, k, v and proj_mlp of a FLUX single block
SHARD_LEAVES = tuple(f"weight_shard_{i}" for i in range(1, MAX_SHARDS))  # rows after those of "weight"
BLOCK_LEAVES = tuple(f"weight_block_{i}" for i in range(MAX_SHARDS))  # block scales of NVFP4 shards


@dataclass(frozen=True)
class Shard:
    """The rows that one stored layer gives to a native Linear.

    `kind` is "fp8" (data E4M3 [rows, columns], `scale` F32 []), "nvfp4" (data U8 [rows, columns / 2], `block` E4M3,
    `scale` F32 []) or "plain" (data in a float dtype, no scale). NVFP4 data are in the host's order, high nibble first;
    `block` is [rows, columns / 16], or already swizzled in the host's 128 x 4 tiles when `swizzled`.
    """

    name: str
    kind: str
    data: Tensor
    scale: Tensor | None = None
    block: Tensor | None = None
    swizzled: bool = False
    input_scale: Tensor | None = None
    full_precision: bool = False


def read_scale(name: str, part: dict[str, Tensor], leaf: str) -> Tensor | None:
    """A scale as F32 scalar, or None. Raises ValueError unless it is finite and positive."""
    scale = part.get(leaf)
    if scale is None:
        return None
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}.{leaf} is {value}: a scale must be a finite positive number")
    return scale.float().reshape(())


def full_precision_marker(name: str, part: dict[str, Tensor], formats: tuple[str, ...]) -> bool:
    """Whether a stored Comfy marker asks for full-precision matmul. Raises ValueError if it names another format."""
    stored = part.get("comfy_quant")
    if stored is None:
        return False
    try:
        conf = json.loads(bytes(stored.tolist()))
    except ValueError as error:
        raise ValueError(f"{name}.comfy_quant is no JSON") from error
    if conf.get("format") not in formats:
        raise ValueError(f"{name}.comfy_quant says format {conf.get('format')!r} but the weight is {formats[0]}")
    return bool(conf.get("full_precision_matrix_mult"))


def marker(conf: dict[str, Any]) -> Tensor:
    """A `comfy_quant` tensor: the JSON of `conf` as U8, as the host stores it."""
    import torch

    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def join_rows(parts: list[Tensor]) -> Tensor:
    """One tensor of all parts' rows: the stored view itself for a single part, one copy for several."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)


def swap_rows(tensor: Tensor) -> Tensor:
    """Exchange the upper and lower half of the rows (diffusers' scale|shift against the vendor's shift|scale)."""
    import torch

    return torch.cat(tuple(reversed(tensor.chunk(2))))

"""Layers as ComfyUI's save nodes write this pack's row shards (ops.py and row_shards.py say what the leaves are)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shards import BLOCK_LEAVES, ROW_SHARDS, SHARD_LEAVES, Shard, full_precision_marker, read_scale
from .stored import PLAIN_DTYPES, ByteOrder, Leaves, scalar_problem

if TYPE_CHECKING:
    from torch import Tensor


def _present(leaves: Leaves | dict[str, Tensor]) -> list[str]:
    return [leaf for leaf in ("weight", *SHARD_LEAVES) if leaf in leaves]


class SavedShards:
    """Row shards as a `formats.StoredFormat`: weight, weight_shard_1.. and weight_scale [shards]."""

    name = "row shards"
    colour = (64, 160, 140)
    words = frozenset({ROW_SHARDS})
    companions = frozenset({"weight_scale", "input_scale", "comfy_quant", *SHARD_LEAVES, *BLOCK_LEAVES})

    def matches(self, leaves: Leaves) -> bool:
        kinds = {"F8_E4M3", "U8", *PLAIN_DTYPES}
        return "weight_shard_1" in leaves and "comfy_quant" in leaves \
            and all(leaves[leaf].dtype in kinds for leaf in _present(leaves))

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        shards = [leaves[leaf] for leaf in _present(leaves)]
        scale = leaves.get("weight_scale")
        if scale is None or scale.dtype != "F32" or tuple(scale.shape) != (len(shards),):
            return f"weight_scale is {list(scale.shape) if scale else 'missing'}, expected F32 {[len(shards)]}"
        fits = all(tuple(s.shape[1:]) == (columns // 2 if s.dtype == "U8" else columns,) for s in shards)
        if not fits or sum(s.shape[0] for s in shards) != rows:
            return f"row shards are {[list(s.shape) for s in shards]}, expected {[rows, columns]} together"
        blocks = [leaf for leaf, s in zip(BLOCK_LEAVES, shards, strict=False) if s.dtype == "U8"]
        if any(leaf not in leaves for leaf in blocks):
            return f"NVFP4 row shards without block scales ({', '.join(blocks)})"
        return scalar_problem(leaves, "input_scale")

    def shards(self, name: str, part: dict[str, Tensor], order: ByteOrder) -> list[Shard]:
        kinds = {"torch.float8_e4m3fn": "fp8", "torch.uint8": "nvfp4"}
        full = full_precision_marker(name, part, (ROW_SHARDS,))
        out = []
        for i, leaf in enumerate(_present(part)):
            data = part[leaf]
            kind = kinds.get(str(data.dtype), "plain")
            scale = read_scale(name, {"weight_scale": part["weight_scale"][i]}, "weight_scale")
            out.append(Shard(f"{name} ({leaf})", kind, data) if kind == "plain" else
                       Shard(f"{name} ({leaf})", kind, data, scale, part.get(BLOCK_LEAVES[i]), kind == "nvfp4",
                             read_scale(name, part, "input_scale"), full))
        return out


SAVED = SavedShards()

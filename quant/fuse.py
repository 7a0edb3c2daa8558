"""Stored layers -> the tensors of one native Linear, every shard's bytes and scale kept as stored.

A native Linear is one stored layer, or the rows of several (q, k, v, and FLUX's proj_mlp). Where one scale holds for
all of them the host's own layout takes it; otherwise each stays a row shard (row_shards.py). Nothing is requantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .shards import BLOCK_LEAVES, HOST_FORMAT, MAX_SHARDS, ROW_SHARDS, SHARD_LEAVES, Shard, join_rows, marker, swap_rows

if TYPE_CHECKING:
    from torch import Tensor





@dataclass(frozen=True)
class Fused:
    """Native tensors of one module (leaf name -> tensor) and how they came about, for the report."""

    tensors: dict[str, Tensor]
    layout: str
    dynamic: bool = False
    notes: tuple[str, ...] = ()












def fuse(shards: list[Shard], *, swap_halves: bool = False, dequantize: bool = False,
         own_nvfp4: bool = False) -> Fused:
    """Turn the shards of one native Linear, in row order, into native tensors. At least one of them is quantized.

    `swap_halves` exchanges the upper and lower half of the rows (single shard only). `dequantize` asks the host for
    full-precision matmul on this module. `own_nvfp4` puts NVFP4 into row shards even where the host's layout would do,
    for other kernels than the host's. Raises ValueError for more shards than the layout holds.
    """
    import torch

    if len(shards) > MAX_SHARDS:
        raise ValueError(f"{shards[0].name}: {len(shards)} row shards, at most {MAX_SHARDS} are supported")
    kinds = {shard.kind for shard in shards}
    quantized = [shard for shard in shards if shard.scale is not None]
    names = ", ".join(shard.name for shard in shards)
    mixed = len(kinds) > 1
    full_precision = dequantize or mixed or any(shard.full_precision for shard in shards)
    notes = [f"partly quantized group, multiplied in full precision: {names}"] if mixed else []

    tensors: dict[str, Tensor] = {}
    inputs = [shard.input_scale for shard in quantized if shard.input_scale is not None]
    static = len(inputs) == len(quantized)
    if static and not mixed:  # a mixed group is multiplied in full precision
        tensors["input_scale"] = torch.stack(inputs).max()
        if any(not torch.equal(scale, inputs[0]) for scale in inputs):
            notes.append(f"different input scales in one group, the largest is used: {names}")
    elif inputs and not mixed:
        notes.append(f"input scale missing in a part of the group, dynamic for all of it: {names}")

    scales = [shard.scale for shard in quantized if shard.scale is not None]
    agree = not mixed and all(torch.equal(scale, scales[0]) for scale in scales)
    kind = shards[0].kind
    # The host's FP8 layout takes 1.0 for a missing activation scale; its NVFP4 layout computes it.
    # Row shards are not padded, so rows that the kernels would pad stay with the host's layout.
    ours = kind == "nvfp4" and own_nvfp4 and not full_precision and not any(s.data.shape[0] % 16 for s in shards)
    if agree and (static or full_precision or kind == "nvfp4") and not ours:
        layout = HOST_FORMAT[kind]
        tensors |= _host_tensors(kind, shards, scales[0], swap_halves)
    else:
        layout = ROW_SHARDS
        tensors |= _shard_tensors(shards, scales, agree, swap_halves)
    full = {"full_precision_matrix_mult": True} if full_precision else {}
    tensors["comfy_quant"] = marker({"format": layout, **full})
    return Fused(tensors, layout, dynamic=not static and not full_precision, notes=tuple(notes))


def _host_tensors(kind: str, shards: list[Shard], scale: Tensor, swap_halves: bool) -> dict[str, Tensor]:
    """All rows in the host's own layout of this kind, under one scale."""
    if kind == "fp8":
        data = join_rows([shard.data for shard in shards])
        return {"weight": swap_rows(data) if swap_halves else data, "weight_scale": scale}
    from .nvfp4 import linear_blocks, pad_rows, swizzle

    if len(shards) == 1 and shards[0].swizzled and not swap_halves:
        data, block = shards[0].data, shards[0].block
        assert block is not None
        return {"weight": pad_rows(data), "weight_scale": block, "weight_scale_2": scale}
    data, block = join_rows([shard.data for shard in shards]), join_rows([linear_blocks(shard) for shard in shards])
    if swap_halves:
        data, block = swap_rows(data), swap_rows(block)
    return {"weight": pad_rows(data), "weight_scale": swizzle(block), "weight_scale_2": scale}


def _shard_tensors(shards: list[Shard], scales: list[Tensor], agree: bool, swap_halves: bool) -> dict[str, Tensor]:
    """Every shard under its own scale (1 for a plain one), in the leaves that ops.py reads."""
    import torch

    if swap_halves and len(shards) > 1:
        raise ValueError(f"{shards[0].name}: halves of a fused layer cannot be exchanged")
    if agree and shards[0].kind == "fp8":  # one scale, and a dynamic activation scale that the host's layout lacks
        data = join_rows([shard.data for shard in shards])
        return {"weight": swap_rows(data) if swap_halves else data, "weight_scale": torch.stack(scales[:1])}
    from .nvfp4 import linear_blocks, swizzle

    if swap_halves:
        block = swap_rows(linear_blocks(shards[0]))
        shards = [replace(shards[0], data=swap_rows(shards[0].data), block=block, swizzled=False)]
    one = torch.ones(())
    tensors = {"weight_scale": torch.stack([one if shard.scale is None else shard.scale for shard in shards])}
    for i, shard in enumerate(shards):
        tensors[SHARD_LEAVES[i - 1] if i else "weight"] = shard.data
        if shard.block is not None:
            tensors[BLOCK_LEAVES[i]] = shard.block if shard.swizzled else swizzle(linear_blocks(shard))
    return tensors

"""Patches of the host's LoRA nodes beside weights that cannot be requantized, exactly: a plain LoRA joins the low-rank
branch of the tiles, anything else becomes a dense delta.

The host would dequantize, add and requantize. A LoRA B @ A on raw x is what the
low-rank pair computes already, so down = [down, A.T] and up = [up, s * B] is exact (docs/sources/nunchaku.md, "LoRA"),
for unsigned activations too. Where the host patches a weight at load (full load), `on_load` puts the longer pair into
the weight; the host's backup takes it off again. Where it leaves patches beside the weight (low VRAM, dynamic VRAM),
`side` adds x @ A.T @ B.T when the layer runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from .layouts.stored import named
from .layouts.tiled import tiles_of, with_tiles
from .tile import Tile

logger = logging.getLogger(__name__)
CALLBACK = "qt.svdquant"
_told: list[str] = []  # the key whose patches the user has heard of


@dataclass(frozen=True)
class Factor:
    """strength * alpha / rank * up [n, r] @ down [r, k], added at [row, column] of the weight."""

    up: Tensor
    down: Tensor
    scale: float
    row: int
    column: int

    def to(self, device: torch.device, dtype: torch.dtype) -> Factor:
        """The same where a forward needs it."""
        return Factor(self.up.to(device, dtype), self.down.to(device, dtype), self.scale, self.row, self.column)


def factors(patches: Iterable[tuple], shape: Sequence[int]) -> list[Factor] | None:
    """The host's patches (strength, value, strength_model, offset, function) of one weight as factors, or None if one
    of them is no plain LoRA: then order and weight matter, and `delta` has to evaluate them."""
    out = []
    for strength, value, strength_model, offset, function in patches:
        if type(value).__name__ != "LoRAAdapter" or strength_model != 1.0 or function is not None:
            return None
        up, down, alpha, mid, dora, reshape = value.weights
        if mid is not None or dora is not None or reshape is not None:
            return None
        up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
        place, size = [0, 0], list(shape)
        if offset is not None:
            dim, place[offset[0]], size[offset[0]] = offset
        if [up.shape[0], down.shape[1]] != size or up.shape[1] != down.shape[0]:
            return None  # the host says so and leaves the weight alone
        if strength:
            out.append(Factor(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]), *place))
    return out


def append(weight: QuantizedTensor, found: list[Factor]) -> QuantizedTensor:
    """The weight with every factor in the low-rank pairs of the parts it touches, in the weight's dtype."""
    dtype = weight._params.orig_dtype
    here = [factor.to(weight._qdata.device, dtype) for factor in found]
    return with_tiles(weight, [_append(tile, here, dtype) for tile in tiles_of(weight)])


def _overlap(start: int, size: int, other: int, other_size: int) -> tuple[slice, slice] | None:
    """The common range of [start, start + size) and [other, other + other_size), counted from the start of each."""
    first, last = max(start, other), min(start + size, other + other_size)
    return None if first >= last else (slice(first - start, last - start), slice(first - other, last - other))


def _append(tile: Tile, found: list[Factor], dtype: torch.dtype) -> Tile:
    p = tile.place
    downs, ups = [], []
    for factor in found:
        rows = _overlap(p.row, p.rows, factor.row, factor.up.shape[0])
        columns = _overlap(p.column, p.columns, factor.column, factor.down.shape[1])
        if rows is None or columns is None:
            continue
        rank = factor.down.shape[0]
        down, up = (torch.zeros(n, rank, dtype=dtype, device=factor.up.device) for n in (p.columns, p.rows))
        down[columns[0]] = factor.down[:, columns[1]].t()
        up[rows[0]] = (factor.up[rows[1]].float() * factor.scale).to(dtype)
        downs.append(down)
        ups.append(up)
    if not downs:
        return tile
    if p.order:
        from .svdquant.packed import append as packed

        return packed(tile, downs, ups)
    return tile.having(down=torch.cat([*(tile[f].to(dtype) for f in ("down",) if f in tile.fields), *downs], 1),
                       up=torch.cat([*(tile[f].to(dtype) for f in ("up",) if f in tile.fields), *ups], 1))


def longer_pairs(weight: QuantizedTensor, found: list[Factor]) -> dict[str, Tensor]:
    """Leaf -> meta tensor of the down and up that `append` would give: for sizes, which a save needs ahead."""
    dtype = weight._params.orig_dtype
    here = [factor.to(torch.device("meta"), dtype) for factor in found]
    longer = [_append(tile.apply(lambda tensor: tensor.to("meta")), here, dtype) for tile in tiles_of(weight)]
    fields, leaves = named(longer)
    return {one[field]: leaves[one[field]] for one in fields for field in ("down", "up") if field in one}


def side(x: Tensor, out: Tensor, found: list[Factor]) -> Tensor:
    """Add to out [..., N], in place, what the factors (on x's device, in its dtype) give for x [..., K]."""
    for factor in found:
        own = x[..., factor.column:factor.column + factor.down.shape[1]]
        out[..., factor.row:factor.row + factor.up.shape[0]] += (own @ factor.down.t() * factor.scale) @ factor.up.t()
    return out


def delta(weight: QuantizedTensor, patches: Iterable[tuple], key: str) -> Tensor:
    """What patches of any kind change the effective weight by, evaluated densely by the host in F32; in the weight's
    dtype. Raises ValueError for a patch that changes the weight's shape."""
    from .. import host

    if not _told:
        _told.append(key)
        logger.warning("%s has patches that are no plain LoRA. On weights that cannot be quantized again they are kept "
                       "as a dense delta: exact, but each such layer takes the memory and time of a 16-bit one.", key)
    before = weight.to(torch.float32).dequantize()
    after = host.calculate_weight(list(patches), before.clone(), key)
    if after.shape != before.shape:
        raise ValueError(f"{key}: a patch changes the shape {list(before.shape)} to {list(after.shape)}, which an "
                         "quantized weight cannot follow")
    return (after - before).to(weight._params.orig_dtype)


def patched(weight: QuantizedTensor, patches: Sequence[tuple], key: str) -> QuantizedTensor:
    """The weight with the patches in it: longer low-rank pairs, or a delta."""
    found = factors(patches, weight.shape)
    if found is not None:
        return append(weight, found) if found else weight
    return add_delta(weight, delta(weight, patches, key))


def add_delta(weight: QuantizedTensor, change: Tensor) -> QuantizedTensor:
    """The weight with `change` [rows, columns], of its dtype, on top."""
    earlier = weight._params.delta
    return with_tiles(weight, tiles_of(weight),
                      delta=change if earlier is None else earlier + change)


def pending(functions: Iterable[Any]) -> list[Any]:
    """Those of a module's weight functions that are patches the host left beside the weight."""
    return [f for f in functions if getattr(f, "is_lowvram_patch", False)]


def patches_of(function: Any) -> list[tuple]:
    """The patches of one of them: those already brought to the device, or the patcher's own."""
    prepared = function.prepared_patches
    return function.patches[function.key] if prepared is None else prepared


def attach_lora(patcher: Any) -> None:
    """Let a ModelPatcher put LoRAs into its SVDQuant weights whenever it loads; its clones inherit this."""
    from .. import host

    host.call_on_load(patcher, CALLBACK, on_load)


def on_load(patcher: Any, device_to: Any, *_: Any) -> None:
    """After a load: put the patches into the weights that the host has just patched (linear.py kept them as they
    were)."""
    for name, module in patcher.model.named_modules():
        if getattr(module, "kept_factors", None) is not None:
            module.kept_factors = None
        if not getattr(module, "awaits_patches", False):
            continue
        module.awaits_patches = False
        if patcher.is_dynamic():  # a weight the host forces onto the device
            module.weight = torch.nn.Parameter(module.weight.to(device_to), requires_grad=False)
        patches = patcher.patches.get(f"{name}.weight")
        if patches:
            module.weight = patched(module.weight, patches, f"{name}.weight")

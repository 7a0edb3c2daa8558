"""Patches that need not know the weight, in factors: W + sum of scale * up @ down, and Kronecker products.

Rules: LoRA is B @ A (arXiv 2106.09685), LoHa the element-wise product of two of those (arXiv 2108.06098), LoKr a
Kronecker product (arXiv 2309.14859, LyCORIS); scales and dtypes as ComfyUI's weight_adapter has them. On raw x a LoRA
is what the low-rank pair of a tile computes already, so down = [down, A.T] and up = [up, s * B] is exact
(docs/sources/nunchaku.md, "LoRA").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..codecs import codec
from ..layouts.tiled import tiles_of, with_tiles
from ..tile import Place, Tile

LARGEST = 256  # rank of a LoHa as a low-rank pair: a matmul with more costs about as much as the layer itself


@dataclass(frozen=True)
class Factor:
    """scale * up [n, r] @ down [r, k], added at [row, column] of the weight."""

    up: Tensor
    down: Tensor
    scale: float
    row: int = 0
    column: int = 0

    def made(self, change: Callable[[Tensor], Tensor]) -> Factor:
        """The same of changed tensors."""
        return replace(self, up=change(self.up), down=change(self.down))

    @property
    def rows(self) -> int:
        """How many rows of the weight it changes."""
        return self.up.shape[0]

    @property
    def columns(self) -> int:
        """How many columns of the weight it changes."""
        return self.down.shape[1]

    @property
    def elements(self) -> int:
        """Numbers that it takes."""
        return self.up.numel() + self.down.numel()

    def add_product(self, x: Tensor, out: Tensor) -> None:
        """x [m, k] times it on top of out [m, n], in place: scaled and added by the product itself, rounded once."""
        out.addmm_(x @ self.down.t(), self.up.t(), alpha=self.scale)

    def dense(self) -> Tensor:
        """[n, k] in F32."""
        return self.scale * self.up.float() @ self.down.float()


@dataclass(frozen=True)
class Kronecker:
    """scale * kron(left [n1, k1], right [n2, k2]), added at [row, column] of the weight."""

    left: Tensor
    right: Tensor
    scale: float
    row: int = 0
    column: int = 0

    def made(self, change: Callable[[Tensor], Tensor]) -> Kronecker:
        """The same of changed tensors."""
        return replace(self, left=change(self.left), right=change(self.right))

    @property
    def rows(self) -> int:
        """How many rows of the weight it changes."""
        return self.left.shape[0] * self.right.shape[0]

    @property
    def columns(self) -> int:
        """How many columns of the weight it changes."""
        return self.left.shape[1] * self.right.shape[1]

    @property
    def elements(self) -> int:
        """Numbers that it takes."""
        return self.left.numel() + self.right.numel()

    def add_product(self, x: Tensor, out: Tensor) -> None:
        """x [m, k] times it on top of out [m, n], in place: row i * n2 + a of the product is left[i] over the groups of
        what right[a] gives."""
        grouped = x.unflatten(-1, (self.left.shape[1], self.right.shape[1]))
        out += (self.left @ (grouped @ self.right.t() * self.scale)).flatten(-2)

    def dense(self) -> Tensor:
        """[n, k] in F32."""
        return self.scale * torch.kron(self.left.float(), self.right.float())


Factors = Sequence[Factor | Kronecker]


def factors(patches: Iterable[tuple], shape: Sequence[int]) -> list[Factor | Kronecker] | None:
    """The host's patches (strength, value, strength_model, offset, function) of one weight as factors, or None if one
    of them is something else: then order and weight matter, and the host has to evaluate them."""
    out: list[Factor | Kronecker] = []
    for strength, value, strength_model, offset, function in patches:
        read = _READ.get(type(value).__name__)
        if read is None or strength_model != 1.0 or function is not None:
            return None
        place, size = [0, 0], list(shape)
        if offset is not None:
            dim, place[offset[0]], size[offset[0]] = offset
        found = read(value.weights)
        if found is None or [found.rows, found.columns] != size:
            return None  # the host says so and leaves the weight alone
        if strength:
            out.append(replace(found, scale=float(strength * found.scale), row=place[0], column=place[1]))
    return out


def _lora(weights: Sequence[Any]) -> Factor | None:
    up, down, alpha, mid, dora, reshape = weights
    if mid is not None or dora is not None or reshape is not None:
        return None
    up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
    if up.shape[1] != down.shape[0]:
        return None
    return Factor(up, down, 1.0 if alpha is None else alpha / down.shape[0])


def _loha(weights: Sequence[Any]) -> Factor | None:
    up, down, alpha, up_2, down_2, core, _, dora = weights
    pairs = ((up, down), (up_2, down_2))
    if core is not None or dora is not None or any(t.ndim != 2 for pair in pairs for t in pair):
        return None
    rank = down.shape[0] * down_2.shape[0]
    if rank > LARGEST or up.shape[0] != up_2.shape[0] or down.shape[1] != down_2.shape[1]:
        return None
    rows, columns = up.shape[0], down.shape[1]
    ups = up.float()[:, :, None] * up_2.float()[:, None]
    downs = down.float()[:, None] * down_2.float()[None]
    return Factor(ups.reshape(rows, rank), downs.reshape(rank, columns),
                  1.0 if alpha is None else alpha / down.shape[0])


def _lokr(weights: Sequence[Any]) -> Kronecker | None:
    left, right, alpha, left_a, left_b, right_a, right_b, core, dora = weights
    if core is not None or dora is not None:
        return None
    rank = None
    if left is None:
        left, rank = left_a.float() @ left_b.float(), left_b.shape[0]
    if right is None:
        right, rank = right_a.float() @ right_b.float(), right_b.shape[0]
    if left.ndim != 2 or right.ndim != 2:
        return None
    return Kronecker(left, right, 1.0 if alpha is None or rank is None else alpha / rank)


_READ: dict[str, Callable[[Sequence[Any]], Factor | Kronecker | None]] = {
    "LoRAAdapter": _lora, "LoHaAdapter": _loha, "LoKrAdapter": _lokr}


def side(x: Tensor, out: Tensor, found: Factors) -> Tensor:
    """out [..., N], which nobody else has, with what the factors (on x's device, in its dtype and out's) give for
    x [..., K] on top."""
    out = out.clone() if out.requires_grad or not out.is_contiguous() else out
    flat, sums = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for one in found:
        own = flat if one.columns == flat.shape[1] else flat[:, one.column:one.column + one.columns]
        one.add_product(own, sums if one.rows == sums.shape[1] else sums[:, one.row:one.row + one.rows])
    return out


def joined(found: Factors) -> list[Factor | Kronecker]:
    """The factors with those of the same rows and columns in one: several LoRAs are one pair of matmuls."""
    groups: dict[tuple[int, ...], list[Factor]] = {}
    out: list[Factor | Kronecker] = []
    for factor in found:
        if isinstance(factor, Factor):
            groups.setdefault((factor.row, factor.column, factor.rows, factor.columns), []).append(factor)
        else:
            out.append(factor)
    for same in groups.values():
        first = same[0]
        out.append(first if len(same) == 1 else replace(
            first, up=torch.cat([one.up.float() * one.scale for one in same], 1),
            down=torch.cat([one.down.float() for one in same]), scale=1.0))
    return out


def added(weight: Tensor, found: Factors) -> Tensor:
    """A float weight [rows, columns] plus the factors, in place."""
    for factor in found:
        where = weight[factor.row:factor.row + factor.rows, factor.column:factor.column + factor.columns]
        where += factor.dense().to(weight)
    return weight


def low_rank(found: Factors) -> bool:
    """Whether all of them are pairs that a tile's low-rank branch can take."""
    return all(isinstance(factor, Factor) for factor in found)


def append(weight: QuantizedTensor, found: Sequence[Factor]) -> QuantizedTensor:
    """A weight of tiles with every factor in the low-rank pairs of the tiles it touches, in the weight's dtype."""
    dtype, device = weight._params.orig_dtype, weight._qdata.device
    here = [factor.made(lambda tensor: tensor.to(device, dtype)) for factor in found]
    return with_tiles(weight, [appended(tile, here, dtype) for tile in tiles_of(weight)])


def appended(tile: Tile, found: Sequence[Factor], dtype: torch.dtype) -> Tile:
    """A tile with the factors (on its device, in `dtype`) in its low-rank pair."""
    p = tile.place
    downs, ups = [], []
    for factor in found:
        rows, columns = _common(p, factor)
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
        from ..svdquant.packed import append as packed

        return packed(tile, downs, ups)
    return tile.having(down=torch.cat([*(tile[f].to(dtype) for f in ("down",) if f in tile.fields), *downs], 1),
                       up=torch.cat([*(tile[f].to(dtype) for f in ("up",) if f in tile.fields), *ups], 1))


def touches(place: Place, factor: Factor) -> bool:
    """Whether a factor changes numbers of a tile."""
    return None not in _common(place, factor)


def have_low_rank(tiles: Sequence[Tile]) -> bool:
    """Whether all of these tiles are in codecs with a low-rank branch of their own, which their kernels multiply."""
    return not any(codec(tile.place.codec).fields["down"].optional for tile in tiles)


def _common(p: Place, factor: Factor) -> tuple[tuple[slice, slice] | None, tuple[slice, slice] | None]:
    """The rows and the columns that a tile and a factor have in common."""
    return (_overlap(p.row, p.rows, factor.row, factor.rows),
            _overlap(p.column, p.columns, factor.column, factor.columns))


def _overlap(start: int, size: int, other: int, other_size: int) -> tuple[slice, slice] | None:
    """The common range of [start, start + size) and [other, other + other_size), counted from the start of each."""
    first, last = max(start, other), min(start + size, other + other_size)
    if first >= last:
        return None
    return slice(first - start, last - start), slice(first - other, last - other)

"""Unsigned integers of up to 8 bits with a scale for every group of columns: what the packers of weights only have in
common (compressed-tensors, GPTQ, AWQ, AutoRound, SDNQ, quanto; quant/packed reads each of them).

    codes    U8  [rows, columns], or [rows, columns / 2]: two of 4 bits a byte, the even column in the low nibble
    scale    F32 [rows, groups]   finite; it may be negative (AutoRound's are, in half of the groups)
    zero     F32 [rows, groups]   zero points, in units of codes; absent means 0
    offset   F32 [rows, groups]   added at the end (SDNQ's zero_point, quanto's -shift); absent means 0
    group    I32 [columns]        the group of every column (GPTQ's g_idx); absent means equal groups in order

In the order of Ascend's operator (quant/ascend/groups.py) codes are signed and everything is transposed.

W[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g] + offset[n, g], g = group[k], in F32 and rounded once. The two forms
are apart because (q - z) * s is exact in what integers and scales of 16 bits make, and q * s + o is not of that form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..tile import Place, Tile
from .base import LOW_RANK, Codec, Field, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype

_GROUPS = Field(("float32",), lambda rows, columns: (rows, -1), 0)


class Groups(Codec):
    """See base.Codec and the module. `bits`: of a code as it is kept, 4 or 8."""

    requantizes = False
    why = "groups of columns with a scale each"

    def __init__(self, bits: int) -> None:
        self.bits, self.name, self.title = bits, f"u{bits}_groups", f"UINT{bits} (groups)"
        per_byte = 8 // bits
        self.fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // per_byte), 0),
                       "scale": _GROUPS, "zero": _GROUPS._replace(optional=True),
                       "offset": _GROUPS._replace(optional=True),
                       "group": Field(("int32",), lambda rows, columns: (columns,), optional=True), **LOW_RANK}
        codes = Field(("int32",), lambda rows, columns: (columns, rows // 8)) if bits == 4 else \
            Field(("int8",), lambda rows, columns: (columns, rows))
        turned = Field(("float32",), lambda rows, columns: (-1, rows))
        self.orders = {"torch_npu": {"codes": codes, "scale": turned, "zero": turned._replace(optional=True),
                                     **LOW_RANK}}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        from ..ascend.mx import unpack

        tile = self.natural(tile)
        codes = tile["codes"]
        if self.bits == 4:
            codes = unpack(codes)
        group, weight = tile.get("group"), codes.float()
        if group is None:
            weight = weight.unflatten(1, (tile["scale"].shape[1], -1))
        spread = {name: tile[name].unsqueeze(-1) if group is None else tile[name][:, group]
                  for name in ("scale", "zero", "offset") if name in tile.fields}
        if "zero" in spread:
            weight = weight - spread["zero"]
        weight = weight * spread["scale"]
        return (weight + spread["offset"] if "offset" in spread else weight).reshape(codes.shape).to(dtype)

    def natural(self, tile: Tile) -> Tile:
        if not tile.place.order:
            return tile
        from ..ascend.groups import natural

        return natural(tile)

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


def tile(name: str, codes: Tensor, scale: Tensor, *, bits: int, zero: Tensor | None = None,
         offset: Tensor | None = None, group: Tensor | None = None, size: int = 0, paired: bool = False) -> Tile:
    """Codes (integers from 0 to 2^bits - 1) [rows, columns] of layer `name` as a tile; scale, zero and offset are
    [rows, groups] in any dtype, `group` [columns] any integers, or there are equal groups of `size` columns (0: as many
    as the shapes tell), the last of which may be smaller. `paired`: codes of up to 4 bits are two a byte already, U8
    [rows, columns / 2].

    Raises ValueError for scales, zeros and offsets that are not finite, and for columns of no group.
    """
    import torch

    rows, columns = codes.shape[0], codes.shape[1] * (2 if paired else 1)
    fields = {"scale": scale, "zero": zero, "offset": offset}
    made = {field: tensor.float().contiguous() for field, tensor in fields.items() if tensor is not None}
    for field, tensor in made.items():
        if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):  # in one pass
            raise ValueError(f"{name}: the packed integers' {field} has values that are not finite")
    count = scale.shape[1]
    if group is not None and bool(((group < 0) | (group >= count)).any()):
        raise ValueError(f"{name}: columns of groups {int(group.min())} to {int(group.max())}, and there are {count}")
    even = columns % count == 0 and size in (0, columns // count)
    if group is None and not even:
        group = torch.arange(columns) // size
    elif group is not None and even and torch.equal(group.long(), torch.arange(columns) // (columns // count)):
        group = None  # the usual order
    kept = 4 if bits <= 4 and columns % 2 == 0 else 8
    codes = codes.to(torch.uint8)
    if kept == 4 and not paired:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return Tile(Place(f"u{kept}_groups", rows, columns), {"codes": codes.contiguous()}).having(
        **made, group=None if group is None else group.to(torch.int32))


CODECS = (Groups(4), Groups(8))

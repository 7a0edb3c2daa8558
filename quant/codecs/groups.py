"""Unsigned integers of up to 8 bits with a scale for every group of columns: what the packers of weights only have in
common (compressed-tensors, GPTQ, AWQ, AutoRound, SDNQ, quanto; quant/packed reads each of them).

    codes    U8    [rows, columns], or [rows, columns / 2]: two of 4 bits a byte, the even column in the low nibble
    scale    float [rows, groups]   finite; it may be negative (AutoRound's are, in half of the groups)
    zero     U8 or F32 [rows, groups]   zero points, in units of codes; absent means 0
    offset   float [rows, groups]   added at the end (SDNQ's zero_point, quanto's -shift); absent means 0
    group    I32   [columns]        the group of every column (GPTQ's g_idx); absent means equal groups in order

In the order of Ascend's operator (quant/ascend/groups.py) codes are signed and everything is transposed.

W[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g] + offset[n, g], g = group[k], in F32 and rounded once. The two forms
are apart because (q - z) * s is exact in what integers and scales of 16 bits make, and q * s + o is not of that form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..scales import FINITE
from ..tile import Place, Tile
from .base import FLOATS, LOW_RANK, Codec, Field, stacked

if TYPE_CHECKING:
    from torch import Tensor, dtype

_GROUPS = Field(FLOATS, lambda rows, columns: (rows, -1), 0, values=FINITE)
ZEROS = ("uint8", "float32")
BESIDE = ("zero", "scale", "offset")  # of groups, in the order in which they are taken


class Groups(Codec):
    """See base.Codec and the module. `bits`: of a code as it is kept, 4 or 8."""

    requantizes = False
    why = Text("groups of columns with a scale each")

    def __init__(self, bits: int) -> None:
        self.bits, self.name, self.title = bits, f"u{bits}_groups", f"UINT{bits} (groups)"
        per_byte = 8 // bits
        self.fields = {"codes": Field(("uint8",), lambda rows, columns: (rows, columns // per_byte), 0),
                       "scale": _GROUPS, "zero": _GROUPS._replace(dtypes=ZEROS, optional=True),
                       "offset": _GROUPS._replace(optional=True),
                       "group": Field(("int32",), lambda rows, columns: (columns,), optional=True), **LOW_RANK}
        codes = Field(("int32",), lambda rows, columns: (columns, rows // 8)) if bits == 4 else \
            Field(("int8",), lambda rows, columns: (columns, rows))
        turned = Field(FLOATS, lambda rows, columns: (-1, rows))
        self.orders = {"torch_npu": {"codes": codes, "scale": turned,
                                     "zero": turned._replace(dtypes=ZEROS, optional=True), **LOW_RANK}}

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        import torch

        tile = self.natural(tile)
        codes = tile["codes"]
        if self.bits == 4:
            pairs = torch.empty(*codes.shape, 2, device=codes.device)
            pairs[..., 0], pairs[..., 1] = codes & 15, codes >> 4
            return decoded(pairs.flatten(1), tile, 1).to(dtype)
        return decoded(codes.float(), tile, 1).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        from ..decode import of_rows

        self.spread(of_rows(tile["codes"], first, last), out)
        beside = {name: of_rows(tile[name], first, last) for name in BESIDE if name in tile.fields}
        decode_groups(beside, tile.get("group"), out)

    def spread(self, codes: Tensor, out: Tensor) -> None:
        """Rows of codes, in their own order, into F32 `out` [rows, columns]."""
        from ..decode import converted, looked_up

        if self.bits == 4:
            looked_up(codes, _pairs(), out)
        else:
            converted(codes, out)

    def grouped(self, tile: Tile) -> Tile:
        """A tile as one of codec groups, in its own order."""
        return self.natural(tile)

    def natural(self, tile: Tile) -> Tile:
        if not tile.place.order:
            return tile
        from ..ascend.groups import natural

        return natural(tile)

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        return stacked(tiles, self.fields)


@cache
def _pairs() -> Any:
    from ..decode import pairs

    return pairs(tuple(map(float, range(16))), low_first=True)


def decoded(codes: Tensor, tile: Tile, axis: int) -> Tensor:
    """Codes in F32, columns on `axis`, to the numbers they mean, in place."""
    group = tile.get("group")
    found = codes if group is not None else codes.unflatten(axis, (tile["scale"].shape[axis], -1))

    def spread(name: str) -> Tensor:
        return tile[name].unsqueeze(axis + 1) if group is None else tile[name].index_select(axis, group)

    if "zero" in tile.fields:
        found -= spread("zero")
    found *= spread("scale")
    if "offset" in tile.fields:
        found += spread("offset")
    return codes


def decode_groups(beside: dict[str, Tensor], group: Tensor | None, out: Tensor) -> None:
    """The same for rows on a CPU, codes in F32 `out` [rows, columns]; `beside` has zero, scale and offset of them."""
    import torch

    from ..decode import at_once, each

    takes = {"zero": torch.Tensor.sub_, "scale": torch.Tensor.mul_, "offset": torch.Tensor.add_}
    if group is None:
        for name, values in beside.items():
            each(takes[name], out, values.float())
        return
    step = max(at_once() // out.shape[1], 1)
    room = torch.empty_like(out[:step])
    for name, values in beside.items():
        for part, few in zip(out.split(step), values.float().contiguous().split(step), strict=True):
            takes[name](part, torch.index_select(few, 1, group, out=room[:len(part)]))


def paired(codes: Tensor) -> Tensor:
    """Codes U8 [rows, columns] of up to 4 bits -> two a byte, [rows, columns / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def tile(name: str, codes: Tensor, scale: Tensor, *, bits: int, zero: Tensor | None = None,
         offset: Tensor | None = None, group: Tensor | None = None, size: int = 0, twos: bool = False) -> Tile:
    """Codes (integers from 0 to 2^bits - 1) [rows, columns] of layer `name` as a tile; scale, zero and offset are
    [rows, groups] in any dtype and strides, `group` [columns] any integers, or there are equal groups of `size` columns
    (0: as many as the shapes tell), the last of which may be smaller. `twos`: codes of up to 4 bits are two a byte
    already, U8 [rows, columns / 2].

    Raises ValueError for columns of no group.
    """
    import torch

    rows, columns = codes.shape[0], codes.shape[1] * (2 if twos else 1)
    fields = companions(name, columns, scale, zero=zero, offset=offset, group=group, size=size)
    kept = 4 if bits <= 4 and columns % 2 == 0 else 8
    codes = codes.to(torch.uint8)
    if kept == 4 and not twos:
        codes = paired(codes)
    return Tile(Place(f"u{kept}_groups", rows, columns), {"codes": codes.contiguous(), **fields})


def companions(name: str, columns: int, scale: Tensor, *, zero: Tensor | None = None, offset: Tensor | None = None,
               group: Tensor | None = None, size: int = 0, axis: int = 1) -> dict[str, Tensor]:
    """What a tile has beside its codes, with groups on `axis`; see `tile`."""
    import torch

    if zero is not None and not zero.is_floating_point() and zero.dtype != torch.uint8:
        whole = zero.numel() == 0 or 0 <= int(zero.min()) <= int(zero.max()) < 256
        zero = zero.to(torch.uint8) if whole else zero.float()
    made = {}
    for field, tensor in {"scale": scale, "zero": zero, "offset": offset}.items():
        if tensor is None:
            continue
        kept = str(tensor.dtype).removeprefix("torch.") in (ZEROS if field == "zero" else FLOATS)
        made[field] = (tensor if kept else tensor.float()).contiguous()
    count = scale.shape[axis]
    if group is not None and bool(((group < 0) | (group >= count)).any()):
        raise ValueError(Text("{name}: columns of groups {first} to {last}, and there are {count}", name=name,
                              first=int(group.min()), last=int(group.max()), count=count))
    even = columns % count == 0 and size in (0, columns // count)
    if group is None and not even:
        group = torch.arange(columns) // size
    elif group is not None and even and torch.equal(group.long(), torch.arange(columns) // (columns // count)):
        group = None  # the usual order
    return made if group is None else {**made, "group": group.to(torch.int32)}


CODECS = (Groups(4), Groups(8))

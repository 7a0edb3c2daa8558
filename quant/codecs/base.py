"""What a codec is: which tensors a weight is stored in, and which numbers they mean.

A new codec is one module with `CODECS` and one line in the registry (`MODULES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...host.texts import Text, either
from ..scales import FINITE, damage
from ..tile import Place, Tile

if TYPE_CHECKING:
    from torch import Tensor, dtype

FLOATS = ("float32", "bfloat16", "float16")
AS_SAVED = {"uint8": "float8_e4m3fn", "int8": "float8_e4m3fn", "int32": "float32"}


class Field(NamedTuple):
    """A tensor of a tile: its dtypes (torch's names), its shape as a rule of rows and columns (-1: any number), and the
    axis that its rows are on (None: all rows have it in common). `values`: what its numbers may be, a rule of
    quant/scales.py ("": anything, as codes are)."""

    dtypes: tuple[str, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    axis: int | None = None
    optional: bool = False
    values: str = ""


class Damage(NamedTuple):
    """What a field of a tile holds (in words) that its rule forbids."""

    field: str
    found: str
    rule: str


# The low-rank branch that any tile may have: up [rows, rank] @ down [columns, rank].T, on the activation as it comes.
LOW_RANK = {"down": Field(FLOATS, lambda rows, columns: (columns, -1), optional=True, values=FINITE),
            "up": Field(FLOATS, lambda rows, columns: (rows, -1), 0, optional=True, values=FINITE)}


class Codec:
    """One way to code a weight. `residual` is what every codec has; the rest says what sets it apart.

    `layout` is the name of the host's layout of such numbers, for `of_host`; its INT8 has two (layout_names.py).

    `title` is its name in messages, `also` others in reports, `feature` what it needs of the host (host/contract.py).
    `fields` are a tile's tensors in the codec's own order, `orders` those in a kernel's. `word` is the host's format
    that means the same numbers (with `conf` beside it in a marker), `switch` the one whose matmul the host may have
    off, and with it those of kernels that lean on it; `why` says in words why the host's layout does not hold such
    tiles. `one_input`: whether one activation scale holds for a whole weight, so that its tiles share what is made of
    the activation; weights that mix these with plain ones are multiplied in full precision. `requantizes`: whether a
    float weight can be coded so again. `listed`: what the doctor has one line for, of codecs that run alike. `deep`:
    scales lie among the codes, so that looking at them reads the whole weight.
    """

    name: str
    title: str
    fields: Mapping[str, Field]
    orders: Mapping[str, Mapping[str, Field]] = {}
    word = ""
    layout = ""
    conf: Mapping[str, Any] = {}
    why = ""
    switch = ""
    feature = ""
    one_input = False
    also: tuple[str, ...] = ()
    shifts = False
    requantizes = True
    listed = ""
    deep = False

    def damage(self, tile: Tile) -> Damage | None:
        """The first field of a tile that holds what no writer of this codec stores; one pass over what is not codes."""
        for name, tensor in tile.fields.items():
            rule = self.fields[name].values
            if rule and (found := damage(tensor, rule)):
                return Damage(name, found, rule)
        return None

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        """The weight [rows, columns] without a low-rank branch, by definition."""
        raise NotImplementedError

    def dequantize(self, tile: Tile, dtype: dtype) -> Tensor:
        """The weight [rows, columns]; with a low-rank branch computed in F32 and rounded once."""
        import torch

        down, up = tile.get("down"), tile.get("up")
        if down is None or up is None or not down.shape[1]:
            return self.residual(tile, dtype)
        if tile.place.order:
            tile = self.natural(tile)
            down, up = tile["down"], tile["up"]
        return torch.addmm(self.residual(tile, torch.float32), up.float(), down.float().t()).to(dtype)

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        """Rows `first` to `last` of the `residual` of a tile in the codec's own order, into F32 `out` [last - first,
        columns]. On a CPU; quant/decode.py has how it is fast."""
        import torch

        out.copy_(self.residual(self.cut(tile, first, last - first), torch.float32))

    def looked_up(self, tile: Tile, index: Tensor, dtype: dtype) -> Tensor:
        """The rows `index` [n] of the weight, [n, columns]: only they are dequantized, where each has its own bytes."""
        fields, rows = {}, tile.place.rows
        for name, tensor in tile.fields.items():
            axis = self.fields[name].axis
            if tile.place.order or axis is not None and tensor.shape[axis] != rows:
                return self.dequantize(tile, dtype)[index]
            fields[name] = tensor if axis is None else tensor.index_select(axis, index)
        return self.dequantize(Tile(tile.place._replace(rows=len(index)), fields), dtype)

    def shift(self, residual: Tensor) -> Tensor | None:
        """What a matmul with the dequantized weight (its `residual` in F32) adds to the bias that is stored, F32
        [rows]; None for nothing, which it is unless `shifts`."""
        return None

    def natural(self, tile: Tile) -> Tile:
        """A tile in a kernel's order -> in the codec's own."""
        return tile

    def loaded(self, tile: Tile, dtype: dtype) -> Tile:
        """A tile as a layer that computes in `dtype` holds it."""
        return tile

    def requantize(self, weight: Tensor, like: Tile, seed: int, **options: Any) -> Tile:
        """A float weight [rows, columns] coded as `like` is, rounded stochastically with a seed other than 0.

        `options` are those of the host's own layouts. Only where `requantizes`.
        """
        raise NotImplementedError(Text("a weight cannot be quantized to {format} again", format=self.title))

    def host(self, tiles: Sequence[Tile], full_precision: bool) -> dict[str, Tensor] | None:
        """The leaves of the host's own layout for tiles of this codec one below the other, where their bytes are the
        same; else None. The marker is `word`'s."""
        return None

    def of_host(self, weight: Any, input_scale: Tensor | None) -> Tile | None:
        """The other way round: a weight in the host's layout (a QuantizedTensor) as a tile, in views where it can be,
        with the activation scale that the layer has beside it; None for layouts of others."""
        return None

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        """Tiles of this codec one below the other as one tile, or None where they differ in what a tile has once."""
        return None

    def cut(self, tile: Tile, first: int, rows: int) -> Tile:
        """`rows` rows of a tile from `first` on, as views where the bytes allow it. Raises ValueError where a tile has
        no such rows alone."""
        parts = {name: tensor if self.fields[name].axis is None else
                 tensor.narrow(self.fields[name].axis or 0, first, rows) for name, tensor in tile.fields.items()}
        return Tile(tile.place._replace(rows=rows, row=tile.place.row + first), parts)

    def swapped(self, tile: Tile) -> Tile:
        """A tile whose upper and lower half of the rows are exchanged."""
        half = tile.place.rows // 2
        parts = [self.cut(tile, half, half), self.cut(tile, 0, half)]
        return Tile(tile.place, stack(parts, self.fields).fields)


def scalar(scale: Tensor | None) -> Tensor | None:
    """A scale of one value as F32 []."""
    import torch

    if scale is None or scale.ndim == 0 and scale.dtype == torch.float32 and not scale.requires_grad:
        return scale
    return scale.detach().float().reshape(())


def stack(tiles: Sequence[Tile], fields: Mapping[str, Field]) -> Tile:
    """Tiles one below the other as one, their rows joined; what rows have in common is that of the first."""
    from ..memory import cat

    first = tiles[0]
    if len(tiles) == 1:
        return first
    joined = {name: tensor if fields[name].axis is None else
              cat([tile[name] for tile in tiles], fields[name].axis or 0)
              for name, tensor in first.fields.items()}
    return Tile(first.place._replace(rows=sum(tile.place.rows for tile in tiles)), joined)


def stacked(tiles: Sequence[Tile], fields: Mapping[str, Field]) -> Tile | None:
    """Tiles that are alike as one, or None; a low-rank branch has columns of its own and keeps them apart."""
    return stack(tiles, fields) if alike(tiles, fields) and "down" not in tiles[0].fields else None


def alike(tiles: Sequence[Tile], fields: Mapping[str, Field]) -> bool:
    """Whether tiles have the same fields, but for their number of rows, and equal values where all rows have one."""
    import torch

    def fits(mine: Tensor, theirs: Tensor, axis: int | None) -> bool:
        if axis is None:
            return torch.equal(mine, theirs)
        sizes = [[size for i, size in enumerate(tensor.shape) if i != axis] for tensor in (mine, theirs)]
        return sizes[0] == sizes[1] and mine.dtype == theirs.dtype

    first = tiles[0]
    return all(tile.fields.keys() == first.fields.keys()
               and all(fits(tile[name], first[name], fields[name].axis) for name in first.fields) for tile in tiles[1:])


Seen = tuple[str, tuple[int, ...]]  # dtype (torch's name) and shape of a tensor


def problem(place: Place, fields: Mapping[str, Seen], codec: Codec) -> str:
    """What is wrong with the fields of a tile, by their dtypes and shapes; empty when nothing is. Integers may be
    floats of their size (layouts.stored.as_saved)."""
    known = codec.orders.get(place.order, {}) if place.order else codec.fields
    if not known:
        return Text("no order {order!r}", order=place.order)
    unknown = fields.keys() - known.keys()
    if unknown:
        return Text("{names} belongs to no {format}", names=", ".join(sorted(unknown)), format=codec.title)
    for name, field in known.items():
        if name not in fields:
            if not field.optional:
                return Text("{leaf} is missing", leaf=name)
            continue
        (dtype, shape), wanted = fields[name], field.shape(place.rows, place.columns)
        if dtype not in field.dtypes and AS_SAVED.get(field.dtypes[0]) != dtype:
            return Text("{leaf} is {found}, expected {expected}", leaf=name, found=dtype,
                        expected=either(field.dtypes))
        if len(shape) != len(wanted) or any(want not in (-1, have) for have, want in zip(shape, wanted, strict=True)):
            return Text("{leaf} is {found}, expected {expected}", leaf=name, found=list(shape),
                        expected=list(wanted))
    return ""

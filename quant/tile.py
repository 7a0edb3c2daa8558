"""A tile: the fields of one codec, and which rows and columns of a native weight they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..host.texts import Text, joined

if TYPE_CHECKING:
    from torch import Tensor


class Place(NamedTuple):
    """A tile without its tensors: what it is, in JSON in a file, and a constant under torch.compile.

    [rows, columns] of the weight from [row, column] on, in the codec of this name. `order`: the bytes are in the order
    of the kernel of that name instead of the codec's own; `number` is a scale once more, as the float such a kernel
    takes.
    """

    codec: str
    rows: int
    columns: int
    row: int = 0
    column: int = 0
    order: str = ""
    number: float = 1.0


@dataclass(frozen=True)
class Tile:
    """A place and its tensors, by the codec's names for them ("codes" first), without those that are not there."""

    place: Place
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def get(self, name: str) -> Tensor | None:
        """A field, or None."""
        return self.fields.get(name)

    def apply(self, change: Callable[[Tensor], Tensor]) -> Tile:
        """The same tile with every tensor changed."""
        return Tile(self.place, {name: change(tensor) for name, tensor in self.fields.items()})

    def having(self, **fields: Tensor | None) -> Tile:
        """The same tile with other fields; None takes one away."""
        return Tile(self.place, {name: tensor for name, tensor in {**self.fields, **fields}.items()
                                 if tensor is not None})

    def at(self, row: int, column: int = 0) -> Tile:
        """The same tile at another place of the weight."""
        return Tile(self.place._replace(row=row, column=column), self.fields)


class Coded(NamedTuple):
    """A stored layer as codecs have it: `tiles` at their places in the layer, and the bias [rows], if there is one.

    `native` is there instead of tiles where the host is to make sense of the layer's own leaves: leaf -> tensor, the
    marker among them. `delta` [rows, columns]: what is added to the tiles' weight. `full_precision`: its file asks for
    full-precision matmul. `notes` are for the report.
    """

    tiles: tuple[Tile, ...] = ()
    bias: Tensor | None = None
    native: Mapping[str, Tensor] | None = None
    delta: Tensor | None = None
    full_precision: bool = False
    notes: tuple[str, ...] = ()


def check_tiling(places: list[Place], shape: tuple[int, int]) -> None:
    """Raises ValueError unless the places cover a weight of this shape, and nothing twice."""
    inside = all(p.row >= 0 <= p.column and p.row + p.rows <= shape[0] and p.column + p.columns <= shape[1]
                 for p in places)
    overlap = any(a.row < b.row + b.rows and b.row < a.row + a.rows and a.column < b.column + b.columns
                  and b.column < a.column + a.columns for i, a in enumerate(places) for b in places[:i])
    if not inside or overlap or sum(p.rows * p.columns for p in places) != shape[0] * shape[1]:
        tiles = joined(", ", (Text("[{rows}, {columns}] at row {row}, column {column}", rows=p.rows, columns=p.columns,
                                   row=p.row, column=p.column) for p in places))
        raise ValueError(Text("tiles {tiles} do not make a weight of {shape}", tiles=tiles, shape=list(shape)))

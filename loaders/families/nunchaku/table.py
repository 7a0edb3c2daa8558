"""How a family's files name their layers: stored layer -> the native modules that its rows and columns go to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ...architectures import Architecture, Dims


class Entry(NamedTuple):
    """A row of a family's table: where one quantized layer of a block goes.

    Its rows are those of the native modules `natives`, in this order. A layer that is only a part of one native module
    has its place there, in multiples of the hidden size: `rows` from `row`, `columns` from `column` (0: all of them).
    `awq` is the number of interleaved vectors of a 4-bit modulation with 16-bit activations (0: it is W4A4).
    `unsigned`: its int4 activations are shifted and unsigned (docs/sources/nunchaku.md, "Unsigned activations").
    """

    natives: tuple[str, ...]
    row: int = 0
    rows: int = 0
    column: int = 0
    columns: int = 0
    awq: int = 0
    unsigned: bool = False


def to(*natives: str, row: int = 0, rows: int = 0, column: int = 0, columns: int = 0, awq: int = 0,
       unsigned: bool = False) -> Entry:
    """An Entry, with the natives as arguments."""
    return Entry(natives, row, rows, column, columns, awq, unsigned)


Table = Mapping[str, Entry]


class Block(NamedTuple):
    """The blocks of one kind: their native and stored names, how many there are, and the table of each."""

    native: str
    stored: str
    number: int
    table: Table
    optional: bool = False  # whether files may leave these blocks unquantized


class Blocks(Protocol):
    def __call__(self, dims: Dims) -> tuple[Block, ...]: ...


@dataclass(frozen=True)
class Family:
    """One architecture as Nunchaku stores it.

    `mark` finds it among stored names, where some also begin with `beside`; `plain` renames the unquantized tensors of
    a block (diffusers' name -> stored one), `class_names` are the classes that metadata uses for it.
    """

    architecture: Architecture
    mark: re.Pattern[str]
    blocks: Blocks
    class_names: frozenset[str]
    plain: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""

    @property
    def name(self) -> str:
        return self.architecture.name

    def stored_plain(self, diffusers: str) -> str:
        """What the files call an unquantized module of this diffusers name."""
        head, dot, rest = _inside_block(diffusers)
        return f"{head}{dot}{self.plain.get(rest, rest)}"

    def entries(self, dims: Dims) -> Iterator[tuple[str, str, Entry, bool]]:
        """(stored layer, native block, its entry, whether it may be unquantized) for a model of these sizes."""
        for block in self.blocks(dims):
            for i in range(block.number):
                for name, entry in block.table.items():
                    yield f"{block.stored}.{i}.{name}", f"{block.native}.{i}.", entry, block.optional


_BLOCK = re.compile(r"^(.*?\.\d+)(\.)(.+)$")


def _inside_block(name: str) -> tuple[str, str, str]:
    found = _BLOCK.match(name)
    return (found[1], found[2], found[3]) if found else ("", "", name)

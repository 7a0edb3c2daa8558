"""How much of a product a program makes, by the number of activations' rows. Calculated, not measured: docs/triton.md
has the arithmetic. Nothing is tried out at first use."""

from __future__ import annotations

from typing import NamedTuple

CROSSOVER = 256  # rows of activations up to which the product decodes the weight itself
ROWS, COLUMNS, WARPS = 16, 256, 4  # of what a program decodes into memory


class Shape(NamedTuple):
    """A program makes [`m`, `rows`], `columns` of the sum at a time, with `warps` of 32 threads and loads `stages`
    steps ahead. Where there would be less than `each` programs a processor, the sum is cut into `most` parts at most.
    """

    m: int
    rows: int
    columns: int
    warps: int
    stages: int
    each: int
    most: int


# Up to so many rows of activations.
SHAPES = ((16, Shape(16, 32, 128, 4, 3, 4, 16)), (64, Shape(64, 128, 64, 8, 3, 1, 8)),
          (CROSSOVER, Shape(128, 128, 64, 8, 3, 1, 2)))


def shape_for(count: int, way: str = "") -> Shape | None:
    """For so many rows of activations; None where the weight is decoded into memory first. `way`: "fused" or "memory",
    whatever their number."""
    found = next((shape for most, shape in SHAPES if count <= most), SHAPES[-1][1] if way == "fused" else None)
    return None if way == "memory" else found


def parts_of(shape: Shape, count: int, rows: int, columns: int, processors: int) -> tuple[int, int]:
    """(parts that the sum is cut into, steps of each) for activations [count, columns] and a weight [rows, columns]:
    a power of two, and four steps or more in each."""
    programs, steps = -(-count // shape.m) * -(-rows // shape.rows), -(-columns // shape.columns)
    parts = 1
    while parts < shape.most and programs * parts < shape.each * processors and steps >= 8 * parts:
        parts *= 2
    return parts, -(-steps // parts)

"""Tiles of any codec from random bytes, by the codec's own table of fields."""

from __future__ import annotations

import torch

from quantized_transformers.quant.codecs import codecs
from quantized_transformers.quant.tile import Place, Tile

CODES = ("codes", "block", "scale")  # of random bytes, where they are bytes
MIXED = ("offset", "zero", "zeros", "table", "input_offset")  # of either sign


def _tensor(name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if dtype in ("uint8", "int8", "float8_e4m3fn") and name in CODES:
        return torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(getattr(torch, dtype))
    if dtype in ("int32", "uint8"):
        return torch.randint(0, 16, shape, generator=generator).to(getattr(torch, dtype))
    low, high = (-8, 8) if name in MIXED else (0.001, 0.02)
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(getattr(torch, dtype))


def any_bytes(name: str, rows: int, columns: int, *, groups: int = 16, optional: bool = False, seed: int = 0) -> Tile:
    """A tile whose codes and block scales are any bytes, NaN among them; with all the codec has when `optional`, but for
    a low-rank branch."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if name == "wfp8afp8_dynamic" else groups  # a scale a row
    fields = {}
    for field, rule in codecs()[name].fields.items():
        if field in ("down", "up") or rule.optional and not optional:
            continue
        shape = tuple(groups if size == -1 else size for size in rule.shape(rows, columns))
        fields[field] = torch.randint(0, groups, shape, generator=generator, dtype=torch.int32) if field == "group" else \
            _tensor(field, rule.dtypes[0], shape, generator)
    return Tile(Place(name, rows, columns), fields)


def usual(name: str, rows: int, columns: int, *, groups: int = 16, seed: int = 0) -> Tile:
    """A tile of numbers only: codes below NaN, block scales and exponents around 1. Not of ggml's blocks, which have
    their scales inside."""
    tile = any_bytes(name, rows, columns, groups=groups, seed=seed)

    def tamed(leaf: str, values: torch.Tensor) -> torch.Tensor:
        if values.dtype == torch.float8_e4m3fn:
            found = values.view(torch.uint8)
            found = 0x30 + found % 16 if leaf in ("block", "scale") else torch.where((found & 127) == 127, 0, found)
            return found.to(torch.uint8).view(torch.float8_e4m3fn)
        return 120 + values % 8 if leaf == "scale" and values.dtype == torch.uint8 else values

    return Tile(tile.place, {leaf: tamed(leaf, values) for leaf, values in tile.fields.items()})

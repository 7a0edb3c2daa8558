"""Unsigned integers with a scale for every group of columns, in the bytes in which GPTQ and AWQ have them: transposed
against nn.Linear. A tile is then views of its file, but for the zero points.

    codes    U8     the bytes of 32-bit words, in the shape [rows, columns / 2] or [rows, columns] of codec groups, as
                    the host counts rows; the words are
                    u4_gptq, u8_gptq   [columns / c, rows], c = 8 or 4 codes, the lowest bits first
                    u4_awq             [columns, rows / 8]: row 8 j + i is in nibble NIBBLES[i] of word j
    scale    float  [groups, rows]
    zero     U8 or F32 [groups, rows]
    group    I32    [columns]

W[n, k] as in codec groups. The weight comes as a view that is transposed: a matmul takes it as well, and nothing is
transposed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...host.texts import Text
from ..memory import cat
from ..scales import FINITE
from ..tile import Place, Tile
from .base import FLOATS, LOW_RANK, Field, alike
from .groups import BESIDE, ZEROS, Groups, companions, decode_groups, decoded, paired

if TYPE_CHECKING:
    from torch import Tensor, dtype

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # autoawq's utils/packing_utils.py


def _gptq4(words: Tensor, out: Tensor) -> None:
    """Words [columns / 8, rows] -> codes [columns, rows] in F32."""
    data, pairs = _bytes(words), out.view(words.shape[0], 4, 2, words.shape[1])
    pairs[:, :, 0] = (data & 15).transpose(1, 2)
    pairs[:, :, 1] = (data >> 4).transpose(1, 2)


def _gptq8(words: Tensor, out: Tensor) -> None:
    """Words [columns / 4, rows] -> codes [columns, rows] in F32."""
    out.view(words.shape[0], 4, words.shape[1])[:] = _bytes(words).transpose(1, 2)


def _awq4(words: Tensor, out: Tensor) -> None:
    """Words [columns, rows / 8] -> codes [columns, rows] in F32."""
    out[:] = awq_codes(words)


def _bytes(words: Tensor) -> Tensor:
    import torch

    return words.view(torch.uint8).unflatten(1, (-1, 4))


def awq_codes(words: Tensor) -> Tensor:
    """AWQ's words I32 [a, b] -> codes U8 [a, 8 b], four of them at a time as the bytes of a word."""
    import torch

    # For the nibble that each byte is to have: how far left, the lowest byte first.
    halves = [[8 * byte - 4 * NIBBLES[first + byte] for byte in range(4)] for first in (0, 4)]
    made = torch.empty(*words.shape, 2, dtype=torch.int32, device=words.device)
    for half, moves in enumerate(halves):
        parts = [(words << left if left > 0 else words >> -left) & 15 << 8 * byte for byte, left in enumerate(moves)]
        made[..., half] = parts[0] | parts[1] | parts[2] | parts[3]
    return made.view(torch.uint8).flatten(1)


class Words(Groups):
    """See base.Codec and the module. `per`: columns that a row of words holds; `unpack` is one of the three above."""

    def __init__(self, name: str, bits: int, per: int, unpack: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__(bits)
        self.name, self.per, self.unpack = name, per, unpack
        groups = Field(FLOATS, lambda rows, columns: (-1, rows), 1, values=FINITE)
        self.fields = {"codes": self.fields["codes"], "scale": groups,
                       "zero": groups._replace(dtypes=ZEROS, optional=True), "group": self.fields["group"], **LOW_RANK}
        self.orders = {}

    def words(self, tile: Tile) -> Tensor:
        """The words I32 [columns / per, words of a row]."""
        import torch

        return _aligned(tile["codes"]).view(tile.place.columns // self.per, -1).view(torch.int32)

    def unpacked(self, tile: Tile) -> Tensor:
        """The codes in F32 [columns, rows]."""
        import torch

        codes = torch.empty(tile.place.columns, tile.place.rows, device=tile["codes"].device)
        self.unpack(self.words(tile), codes)
        return codes

    def residual(self, tile: Tile, dtype: dtype) -> Tensor:
        return decoded(self.unpacked(tile), tile, 0).to(dtype).t()

    def decode_rows(self, tile: Tile, first: int, last: int, out: Tensor) -> None:
        import numpy as np
        import torch

        words = self.words(tile)
        each = tile.place.rows // words.shape[1]
        self.aligned(first, last - first, each)
        near = words.numpy()[:, first // each:last // each].copy()  # two copies take a third of one's time
        turned = np.ascontiguousarray(near.T)
        if self.per > 1:
            self.spread(torch.from_numpy(turned.view(np.uint8)), out)
        else:
            for row, nibble in enumerate(NIBBLES):
                out.numpy()[row::8] = turned >> 4 * nibble & 15
        beside = {name: tile[name][:, first:last].t() for name in BESIDE if name in tile.fields}
        decode_groups(beside, tile.get("group"), out)

    def aligned(self, first: int, rows: int, each: int) -> None:
        """Raises ValueError for rows that share words with others, of which each has `each`."""
        if first % each or rows % each:
            raise ValueError(Text("{rows} rows from {first} on of a layer in AWQ's words cannot be taken alone",
                                  rows=rows, first=first))

    def dequantize(self, tile: Tile, dtype: dtype) -> Tensor:
        return super().dequantize(tile, dtype).contiguous()

    def looked_up(self, tile: Tile, index: Tensor, dtype: dtype) -> Tensor:
        return self.dequantize(tile, dtype)[index]

    def natural(self, tile: Tile) -> Tile:
        return tile

    def loaded(self, tile: Tile, dtype: dtype) -> Tile:
        return tile.having(codes=_aligned(tile["codes"]))

    def grouped(self, tile: Tile) -> Tile:
        import torch

        codes = self.unpacked(tile).t().to(torch.uint8)
        turned = {name: tile[name].t().contiguous() for name in ("scale", "zero") if name in tile.fields}
        fields = {**tile.fields, "codes": paired(codes) if self.bits == 4 else codes.contiguous(), **turned}
        return Tile(tile.place._replace(codec=f"u{self.bits}_groups"), fields)

    def merge(self, tiles: Sequence[Tile]) -> Tile | None:
        if "down" in tiles[0].fields or not alike(tiles, self.fields):
            return None
        rows = sum(tile.place.rows for tile in tiles)
        words = cat([self.words(tile) for tile in tiles], 1)
        beside = {name: cat([tile[name] for tile in tiles], 1) for name in ("scale", "zero") if name in tiles[0].fields}
        return Tile(tiles[0].place._replace(rows=rows), {**tiles[0].fields, "codes": _codes(words, rows), **beside})

    def cut(self, tile: Tile, first: int, rows: int) -> Tile:
        words = self.words(tile)
        each = tile.place.rows // words.shape[1]  # rows in a word
        self.aligned(first, rows, each)
        alone = super().cut(tile.having(codes=None), first, rows)
        return alone.having(codes=_codes(words.narrow(1, first // each, rows // each).contiguous(), rows))

    def swapped(self, tile: Tile) -> Tile:
        words = self.words(tile)
        if words.shape[1] % 2:
            raise ValueError(Text("halves of a layer of {rows} rows in AWQ's words cannot be exchanged",
                                  rows=tile.place.rows))
        turned = {name: cat(tile[name].chunk(2, 1)[::-1], 1) for name in ("scale", "zero") if name in tile.fields}
        up = None if "up" not in tile.fields else cat(tile["up"].chunk(2)[::-1])
        codes = _codes(cat(words.chunk(2, 1)[::-1], 1), tile.place.rows)
        return tile.having(codes=codes, up=up, **turned)


def _aligned(codes: Tensor) -> Tensor:
    """Bytes that can be seen as words: in a file they may lie behind bytes of any number."""
    return codes.clone() if codes.storage_offset() % 4 else codes


def as_stored(name: str, codec: str, words: Tensor, columns: int, scale: Tensor, zero: Tensor, **beside: Any) -> Tile:
    """The words I32 of a layer's file as a tile; scale and zero are [groups, rows], the rest as of groups.companions.

    Raises ValueError as it does.
    """
    rows = scale.shape[1]
    fields = companions(name, columns, scale, zero=zero, axis=0, **beside)
    return Tile(Place(codec, rows, columns), {"codes": _codes(words, rows), **fields})


def _codes(words: Tensor, rows: int) -> Tensor:
    """Words as a tile has them."""
    import torch

    return words.view(torch.uint8).view(rows, -1)


CODECS = (Words("u4_gptq", 4, 8, _gptq4), Words("u8_gptq", 8, 4, _gptq8), Words("u4_awq", 4, 1, _awq4))

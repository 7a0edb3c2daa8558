"""Tiles of SVDQuant in nunchaku's own order, for its kernels: padded to 128 (the rank to 16), in its fragments.

AWQ has no low-rank branch there, so that of a LoRA stays in natural order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import ceil_to, linear_blocks, swap_nibbles
from ..tile import Place, Tile
from . import packing
from .parts import CODEC, FIELDS, KIND, Part, tile_of

ORDER = "nunchaku"


def part_of(tile: Tile) -> Part:
    """A tile in natural order; for nunchaku's order, and NVFP4, the codes and scales are converted back (copies)."""
    place, kind = tile.place, KIND[tile.place.codec]
    fields: dict[str, Any] = dict(tile.fields)
    if place.order:
        fields = _unpacked(tile)
    elif kind == "nvfp4":
        fields["codes"] = swap_nibbles(tile["codes"][:place.rows])
        fields["scale"] = linear_blocks(tile["scale"], place.rows, place.columns // 2)
    return Part(kind, **{name: fields[name] for name in FIELDS if name in fields},
                unsigned=place.codec == CODEC["int4", True])


def natural(tile: Tile) -> Tile:
    """A tile in nunchaku's order -> in the codec's own."""
    made = tile_of(part_of(tile))
    return Tile(tile.place._replace(order="", number=1.0), made.fields)


def padded_sizes(place: Place) -> tuple[int, int]:
    """Rows and columns of the packed tensors."""
    if KIND[place.codec] == "awq":
        return place.rows, place.columns
    return ceil_to(place.rows, 128), ceil_to(place.columns, 128)


def packed(tile: Tile) -> Tile:
    """A tile in the codec's own order -> in nunchaku's. The inverse of `natural`, bit for bit."""
    part, place = part_of(tile), tile.place._replace(order=ORDER)
    if part.kind == "awq":
        return Tile(place, {**tile.fields, "codes": packing.pack_awq(part.codes)})
    assert part.smooth is not None and part.down is not None and part.up is not None
    n, k = padded_sizes(place)
    rows, columns = n - part.rows, k - part.columns
    fields = {"codes": packing.pack_qweight(pad(part.codes, (0, columns // 2, 0, rows))),
              "smooth": packing.pack_vector(pad(part.smooth, (0, columns), value=1.0)),
              # F32 in what a model computing in F32 has saved with a LoRA
              **_packed_pair(part.down.to(part.smooth.dtype), part.up.to(part.smooth.dtype), place)}
    if part.kind == "int4":
        fields["scale"] = packing.pack_scales(pad(part.scale, (0, rows, 0, columns // 64)))
    else:
        scale = pad(part.scale.view(torch.uint8), (0, columns // 16, 0, rows)).view(part.scale.dtype)
        fields["scale"] = packing.pack_micro_scales(scale)
        ones = torch.ones(part.rows, dtype=part.smooth.dtype)
        channel = ones if part.channel_scale is None else part.channel_scale
        fields["channel_scale"] = packing.pack_vector(pad(channel, (0, rows)))
        assert part.tensor_scale is not None
        place = place._replace(number=float(part.tensor_scale))
    return Tile(place, {**tile.fields, **fields})


def _packed_pair(down: Tensor, up: Tensor, place: Place) -> dict[str, Tensor]:
    """A low-rank pair in natural order -> packed, padded to whole ranks of 16."""
    n, k = padded_sizes(place)
    rank = -down.shape[1] % 16
    return {"down": packing.pack_down(pad(down, (0, rank, 0, k - place.columns))),
            "up": packing.pack_up(pad(up, (0, rank, 0, n - place.rows)))}


def _unpacked(tile: Tile) -> dict[str, Tensor]:
    """The fields of a tile in nunchaku's order in natural order, cropped to its rows and columns."""
    p, fields = tile.place, dict(tile.fields)
    if KIND[p.codec] == "awq":
        return fields | {"codes": packing.unpack_awq(tile["codes"])}
    fields |= {"codes": packing.unpack_qweight(tile["codes"])[:p.rows, :p.columns // 2].contiguous(),
               "smooth": packing.unpack_vector(tile["smooth"])[:p.columns].contiguous(),
               "down": packing.unpack_down(tile["down"])[:p.columns].contiguous(),
               "up": packing.unpack_up(tile["up"])[:p.rows].contiguous()}
    if KIND[p.codec] == "int4":
        return fields | {"scale": packing.unpack_scales(tile["scale"])[:p.columns // 64, :p.rows].contiguous()}
    scale = packing.unpack_micro_scales(tile["scale"]).view(torch.uint8)[:p.rows, :p.columns // 16].contiguous()
    return fields | {"scale": scale.view(tile["scale"].dtype),
                     "channel_scale": packing.unpack_vector(tile["channel_scale"])[:p.rows].contiguous()}


def append(tile: Tile, downs: list[Tensor], ups: list[Tensor]) -> Tile:
    """A packed tile with further low-rank pairs (natural order) behind its own; in 16 bit, as the kernels need it."""
    p, dtype = tile.place, tile["down"].dtype
    if KIND[p.codec] == "awq":
        return tile.having(down=torch.cat([tile["down"], *downs], 1), up=torch.cat([tile["up"], *ups], 1))
    own = packing.unpack_down(tile["down"])[:p.columns], packing.unpack_up(tile["up"])[:p.rows]
    down, up = (torch.cat([t, *(one.to(dtype) for one in more)], 1) for t, more in zip(own, (downs, ups), strict=True))
    return tile.having(**_packed_pair(down, up, p))

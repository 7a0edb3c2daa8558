"""A part of an SVDQuant weight as the layout holds it, in natural order or in nunchaku's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy_kitchen.float_utils import from_blocked
from torch import Tensor
from torch.nn.functional import pad

from ..nvfp4 import ceil_to
from . import packing
from .parts import FIELDS, Part, Place


class Held(NamedTuple):
    """A part as the layout holds it: natural order, but NVFP4 in the host's (parts.stored_fields), or, where
    `place.packed`, padded and in nunchaku's own order."""

    place: Place
    codes: Tensor
    scale: Tensor
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    channel_scale: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> Held:
        """The same part with every tensor changed."""
        rest = (t if t is None else change(t) for t in self[3:])
        return Held(self.place, change(self.codes), change(self.scale), *rest)


def natural(held: Held) -> Part:
    """A held part in natural order; for NVFP4 the codes and scales are converted back (copies)."""
    place, fields_ = held.place, {field: getattr(held, field) for field in FIELDS}
    if place.packed:
        from .held import unpacked

        fields_ = unpacked(held)
    elif place.kind == "nvfp4":
        from ..nvfp4 import swap_nibbles

        fields_["codes"] = swap_nibbles(held.codes[:place.rows])
        fields_["scale"] = from_blocked(held.scale.view(torch.uint8), place.rows, place.columns // 16) \
            .contiguous().view(held.scale.dtype)
    return Part(place.kind, **fields_, unsigned=place.unsigned, row=place.row, column=place.column)


def padded_sizes(place: Place) -> tuple[int, int]:
    """Rows and columns of the packed tensors."""
    if place.kind == "awq":
        return place.rows, place.columns
    return ceil_to(place.rows, 128), ceil_to(place.columns, 128)


def packed(held: Held) -> Held:
    """A part in natural order -> packed, for the kernels. The inverse of `unpacked`, bit for bit."""
    part = natural(held)
    place = held.place._replace(packed=True)
    if part.kind == "awq":
        return held._replace(place=place, codes=packing.pack_awq(part.codes))
    assert part.smooth is not None and part.down is not None and part.up is not None
    n, k = padded_sizes(place)
    rows, columns = n - part.rows, k - part.columns
    fields = {"codes": packing.pack_qweight(pad(part.codes, (0, columns // 2, 0, rows))),
              "smooth": packing.pack_vector(pad(part.smooth, (0, columns), value=1.0)),
              # F32 in what a model computing in F32 has saved with a LoRA
              **packed_pair(part.down.to(part.smooth.dtype), part.up.to(part.smooth.dtype), place)}
    if part.kind == "int4":
        fields["scale"] = packing.pack_scales(pad(part.scale, (0, rows, 0, columns // 64)))
    else:
        scale = pad(part.scale.view(torch.uint8), (0, columns // 16, 0, rows)).view(part.scale.dtype)
        fields["scale"] = packing.pack_micro_scales(scale)
        ones = torch.ones(part.rows, dtype=part.smooth.dtype)
        channel = ones if part.channel_scale is None else part.channel_scale
        fields["channel_scale"] = packing.pack_vector(pad(channel, (0, rows)))
        assert part.tensor_scale is not None
        place = place._replace(alpha=float(part.tensor_scale))
    return held._replace(place=place, **fields)


def packed_pair(down: Tensor, up: Tensor, place: Place) -> dict[str, Tensor]:
    """A low-rank pair in natural order -> packed, padded to whole ranks of 16."""
    n, k = padded_sizes(place)
    rank = -down.shape[1] % 16
    return {"down": packing.pack_down(pad(down, (0, rank, 0, k - place.columns))),
            "up": packing.pack_up(pad(up, (0, rank, 0, n - place.rows)))}


def unpacked(held: Held) -> dict[str, Tensor | None]:
    """The fields of a packed part in natural order, cropped to its rows and columns."""
    p = held.place
    fields: dict[str, Tensor | None] = {field: getattr(held, field) for field in FIELDS}
    if p.kind == "awq":
        return fields | {"codes": packing.unpack_awq(held.codes)}
    assert held.smooth is not None and held.down is not None and held.up is not None
    fields |= {"codes": packing.unpack_qweight(held.codes)[:p.rows, :p.columns // 2].contiguous(),
               "smooth": packing.unpack_vector(held.smooth)[:p.columns].contiguous(),
               "down": packing.unpack_down(held.down)[:p.columns].contiguous(),
               "up": packing.unpack_up(held.up)[:p.rows].contiguous()}
    if p.kind == "int4":
        return fields | {"scale": packing.unpack_scales(held.scale)[:p.columns // 64, :p.rows].contiguous()}
    assert held.channel_scale is not None
    scale = packing.unpack_micro_scales(held.scale).view(torch.uint8)[:p.rows, :p.columns // 16].contiguous()
    return fields | {"scale": scale.view(held.scale.dtype),
                     "channel_scale": packing.unpack_vector(held.channel_scale)[:p.rows].contiguous()}


def append(held: Held, downs: list[Tensor], ups: list[Tensor]) -> Held:
    """A packed part with further low-rank pairs (natural order) behind its own; in 16 bit, as the kernels need it."""
    assert held.down is not None and held.up is not None
    p, dtype = held.place, held.down.dtype
    if p.kind == "awq":
        return held._replace(down=torch.cat([held.down, *downs], 1), up=torch.cat([held.up, *ups], 1))
    own = packing.unpack_down(held.down)[:p.columns], packing.unpack_up(held.up)[:p.rows]
    down, up = (torch.cat([t, *(one.to(dtype) for one in more)], 1) for t, more in zip(own, (downs, ups), strict=True))
    pair = packed_pair(down, up, p)
    return held._replace(down=pair["down"], up=pair["up"])

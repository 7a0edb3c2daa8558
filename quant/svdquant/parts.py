"""Nunchaku's stored tensors -> parts of a native Linear, in natural order, and parts -> tiles.

What arrives here is one layer of a file, by the names of format v2. Dtypes and shapes are checked before anything is
moved, because raw and converted tensors have the same shapes and running the raw ones gives noise without an error
(docs/formats/svdquant-int4.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...host.texts import Text, either
from ..blocks import ceil_to
from ..scales import FINITE, checked
from ..tile import Place, Tile

if TYPE_CHECKING:
    from torch import Tensor

SHIFT = 0.171875  # added to activations of unsigned layers (docs/sources/nunchaku.md, "Unsigned activations")
GROUP = {"int4": 64, "nvfp4": 16, "awq": 64}
# (kind, whether activations are unsigned) -> codec
CODEC = {("int4", False): "svdq_int4", ("int4", True): "svdq_int4_unsigned", ("nvfp4", False): "svdq_nvfp4",
         ("awq", False): "awq"}
KIND = {name: kind for (kind, _), name in CODEC.items()}
HALF = ("bfloat16", "float16")
FIELDS = ("codes", "scale", "zeros", "tensor_scale", "channel_scale", "smooth", "down", "up")


class Order(Protocol):
    """A writer's order of bytes: the module packing.py is Nunchaku's, row_major.py has another."""

    def unpack_qweight(self, codes: Tensor, /) -> Tensor: ...
    def unpack_micro_scales(self, scales: Tensor, /) -> Tensor: ...
    def unpack_vector(self, vector: Tensor, /) -> Tensor: ...
    def unpack_down(self, down: Tensor, /) -> Tensor: ...
    def unpack_up(self, up: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """One SVDQuant (or AWQ) linear in natural order.

    `kind` is "int4", "nvfp4" or "awq". `codes` is U8 [N, K/2], even column in the low nibble: two's complement (int4),
    E2M1 (nvfp4) or 0..15 (awq). `scale` is [K/64, N], for nvfp4 E4M3 [N, K/16]; awq's `zeros` [K/64, N] are
    the file's, W = q * s + z. `tensor_scale` (one value) and `channel_scale` [N] are nvfp4's.
    W = q * scales / `smooth` [K] + `up` [N, R] @ `down` [K, R].T, the low-rank pair on the raw activation. `unsigned`:
    the activation is shifted by 0.171875 onto an unsigned grid (int4 only) and the stored bias is right for that.
    """

    kind: str
    codes: Tensor
    scale: Tensor
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    channel_scale: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    unsigned: bool = False

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 2


def _check(leaves: dict[str, Tensor], leaf: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """The leaf, if it has one of the dtypes and the shape. Raises ValueError. What its numbers may be is said with the
    tiles' fields."""
    tensor = leaves.get(leaf)
    if tensor is None:
        raise ValueError(Text("{leaf} is missing", leaf=leaf))
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in dtypes:
        raise ValueError(Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=dtype,
                              expected=either(dtypes)))
    if tuple(tensor.shape) != shape:
        raise ValueError(Text("{leaf} is {found}, expected {expected}", leaf=leaf, found=list(tensor.shape),
                              expected=list(shape)))
    return tensor


def w4a4_part(leaves: dict[str, Tensor], rows: int, columns: int, unsigned: bool = False,
              order: Order | None = None) -> tuple[Part, Tensor]:
    """One W4A4 layer of a file (tensors by v2 name: qweight, wscales, smooth_factor, proj_down, proj_up, bias, and
    wtscale and wcscales of nvfp4) -> its part and its bias [rows], both in natural order, cropped to [rows, columns]
    and in memory of their own.

    Precision is the dtype of wscales, rank the width of proj_down; `order` is that of NVFP4 leaves where it is not
    Nunchaku's. Raises ValueError for a missing leaf, a wrong dtype or shape, a bias that is not finite or a smooth
    factor of zero.
    """
    from . import packing

    own = packing if order is None else order
    scales = leaves.get("wscales")
    fp4 = scales is not None and str(scales.dtype) == "torch.float8_e4m3fn"
    kind = "nvfp4" if fp4 else "int4"
    if columns % GROUP[kind]:
        raise ValueError(Text("{columns} columns are no multiple of {group}, the group of {kind}", columns=columns,
                              group=GROUP[kind], kind=kind))
    n, k = ceil_to(rows, 128), ceil_to(columns, 128)
    codes = _check(leaves, "qweight", ("int8",) if order is None else ("int8", "uint8"), (n, k // 2))
    stored = _check(leaves, "wscales", ("float8_e4m3fn",) if fp4 else HALF, (k // GROUP[kind], n))
    smooth = _check(leaves, "smooth_factor", HALF, (k,))
    rank = leaves["proj_down"].shape[-1] if "proj_down" in leaves else 0
    if not rank:
        raise ValueError(Text("proj_down is missing, expected a multiple of 16"))
    if rank % 16:
        raise ValueError(Text("proj_down is of rank {rank}, expected a multiple of 16", rank=rank))
    down = _check(leaves, "proj_down", HALF, (k, rank))
    up = _check(leaves, "proj_up", HALF, (n, rank))
    bias = checked("bias", _check(leaves, "bias", HALF, (n,)), FINITE)
    if unsigned and fp4:
        raise ValueError(Text("NVFP4 layers have no unsigned activations"))
    if order is not None and not fp4:
        raise ValueError(Text("INT4 weights in another order than Nunchaku's, which no writer is known to have"))
    if fp4:
        scale = own.unpack_micro_scales(stored)[:rows, :columns // 16]
        fields = _fp4_scales(leaves, rows, n, own)
    else:
        if "wtscale" in leaves or "wcscales" in leaves:
            raise ValueError(Text("wtscale or wcscales beside INT4 weights: these belong to NVFP4"))
        scale, fields = packing.unpack_scales(stored)[:columns // 64, :rows], dict[str, Any]()
    smooth = own.unpack_vector(smooth)[:columns]
    if not bool((smooth != 0).all()):
        raise ValueError(Text("smooth_factor has zeros: activations are divided by it"))
    part = Part(kind, own.unpack_qweight(codes)[:rows, :columns // 2].contiguous(), scale.contiguous(),
                smooth=smooth.contiguous(), down=own.unpack_down(down)[:columns].contiguous(),
                up=own.unpack_up(up)[:rows].contiguous(), unsigned=unsigned)
    return replace(part, **fields), own.unpack_vector(bias)[:rows].contiguous()


def _fp4_scales(leaves: dict[str, Tensor], rows: int, n: int, order: Order) -> dict[str, Any]:
    """The second-level scales of nvfp4: a missing wtscale is 1.0, a missing wcscales ones
    (docs/formats/svdquant-nvfp4.md)."""
    import torch

    fields = {"tensor_scale": torch.ones(())}
    if "wtscale" in leaves:
        scale = leaves["wtscale"]
        if scale.numel() != 1:
            raise ValueError(Text("wtscale is {shape}, expected one value", shape=list(scale.shape)))
        fields["tensor_scale"] = torch.tensor(float(scale), dtype=torch.float32)
    if "wcscales" in leaves:
        stored = _check(leaves, "wcscales", HALF, (n,))
        fields["channel_scale"] = order.unpack_vector(stored)[:rows].contiguous()
    return fields


def awq_part(leaves: dict[str, Tensor], rows: int, columns: int, interleaved: int = 0) -> tuple[Part, Tensor]:
    """One AWQ W4A16 layer (qweight, wscales, wzeros, bias) -> its part and its bias F32 or as stored [rows].

    Group rows that pad to 16 are stripped. `interleaved` = S (3 or 6) undoes the order [D, S] of modulation rows and
    takes the folded 1 off the biases of index 1 and S - 2, in F32 (docs/sources/nunchaku.md, "Modulation"). The rank of
    the part is 0: a LoRA goes there. Both are in memory of their own. Raises ValueError as w4a4_part does.
    """
    import torch

    from . import packing

    if columns % 64 or rows % 4:
        raise ValueError(Text("[{rows}, {columns}] is no AWQ shape: rows must be a multiple of 4 and columns of 64",
                              rows=rows, columns=columns))
    groups = columns // 64
    stored = len(leaves["wscales"]) if "wscales" in leaves else 0
    padded = (stored if stored == groups else ceil_to(groups, 16), rows)
    if interleaved and (interleaved not in (3, 6) or rows % interleaved):
        raise ValueError(Text("{rows} rows do not interleave {count} modulation vectors", rows=rows,
                              count=interleaved))
    codes = packing.unpack_awq(_check(leaves, "qweight", ("int32",), (rows // 4, columns // 2)), interleaved or 1)
    scale = _check(leaves, "wscales", HALF, padded)[:groups]
    zeros = _check(leaves, "wzeros", HALF, padded)[:groups]
    bias = checked("bias", _check(leaves, "bias", HALF, (rows,)), FINITE)
    if interleaved:
        d = rows // interleaved
        scale, zeros = (t.reshape(groups, d, interleaved).transpose(1, 2).reshape(groups, rows) for t in (scale, zeros))
        natural = bias.float().view(d, interleaved).t().contiguous()
        natural[sorted({1, interleaved - 2})] -= 1
        bias = natural.view(-1)
    else:
        scale, zeros, bias = scale.clone(), zeros.clone(), bias.clone()
    none = torch.zeros(columns, 0, dtype=scale.dtype), torch.zeros(rows, 0, dtype=scale.dtype)
    return Part("awq", codes, scale, zeros=zeros, down=none[0], up=none[1]), bias


def split_rows(part: Part, counts: Sequence[int]) -> list[Part]:
    """A part as slices of `counts` rows, for native modules that are separate; down and smooth are shared.

    Raises ValueError unless the counts add up.
    """
    if sum(counts) != part.rows:
        raise ValueError(Text("{rows} rows cannot be split into {counts}", rows=part.rows, counts=list(counts)))
    out, row = [], 0
    for count in counts:
        rows = slice(row, row + count)
        by_row = {name: getattr(part, name) for name in ("codes", "channel_scale", "up")}
        by_row |= {name: tensor for name, tensor in (("scale", part.scale),) if part.kind == "nvfp4"}
        fields = {name: tensor[rows].contiguous() for name, tensor in by_row.items() if tensor is not None}
        if part.kind != "nvfp4":
            fields["scale"] = part.scale[:, rows].contiguous()
        if part.zeros is not None:
            fields["zeros"] = part.zeros[:, rows].contiguous()
        out.append(replace(part, **fields))
        row += count
    return out


def tile_of(part: Part) -> Tile:
    """A part as a tile: natural order, but nvfp4 in the host's (high nibble first, rows padded to 16, block scales in
    128 x 4 tiles), converted once here, its codes in place: the part is used up."""
    fields = {field: getattr(part, field) for field in FIELDS if getattr(part, field) is not None}
    if part.kind == "nvfp4":
        from .. import blocks

        fields["codes"] = blocks.pad_rows(blocks.swap_nibbles(part.codes, part.codes))
        fields["scale"] = blocks.swizzle(part.scale)
    return Tile(Place(CODEC[part.kind, part.unsigned], part.rows, part.columns), fields)

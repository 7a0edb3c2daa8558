"""Nunchaku's stored tensors -> parts of a native Linear, in natural order, and parts -> the Linear's state dict.

What arrives here is one layer of a file, by the names of format v2. Dtypes and shapes are checked before anything is
moved, because raw and converted tensors have the same shapes and running the raw ones gives noise without an error
(docs/formats/svdquant-int4.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..nvfp4 import ceil_to

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "qt.svdquant"  # this pack's marker; the host may take a name of its own later
SHIFT = 0.171875  # added to activations of unsigned layers (docs/sources/nunchaku.md, "Unsigned activations")
GROUP = {"int4": 64, "nvfp4": 16, "awq": 64}
MAX_PARTS = 2  # FLUX linear1 (qkv over mlp) and linear2 (attn beside mlp)
HALF = ("bfloat16", "float16")
FIELDS = ("codes", "scale", "zeros", "tensor_scale", "channel_scale", "smooth", "down", "up")


@dataclass(frozen=True)
class Part:
    """One SVDQuant (or AWQ) linear in natural order; placed at rows [row:row+N], columns [column:column+K] of a native
    weight.

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
    row: int = 0
    column: int = 0

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 2


class Place(NamedTuple):
    """What a part is and where it goes, without its tensors: the marker's JSON, and a constant under torch.compile."""

    kind: str
    rows: int
    columns: int
    row: int = 0
    column: int = 0
    unsigned: bool = False
    packed: bool = False  # in nunchaku's own order, for its kernels (nunchaku_ops.py)
    alpha: float = 1.0  # the tensor scale again, as the number those kernels take


def _check(leaves: dict[str, Tensor], leaf: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """The leaf, if it has one of the dtypes and the shape and is finite. Raises ValueError."""
    tensor = leaves.get(leaf)
    if tensor is None:
        raise ValueError(f"{leaf} is missing")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in dtypes:
        raise ValueError(f"{leaf} is {dtype}, expected {' or '.join(dtypes)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{leaf} is {list(tensor.shape)}, expected {list(shape)}")
    if tensor.is_floating_point() and not _finite(tensor):
        raise ValueError(f"{leaf} has values that are not finite")
    return tensor


def _finite(tensor: Tensor) -> bool:
    """Whether all values are: read once and copied nowhere, which is ten times as fast as isfinite()."""
    import torch
    if tensor.dtype == torch.float8_e4m3fn:  # no infinities, and one NaN of each sign
        return int((tensor.view(torch.uint8) & 0x7F).max()) < 0x7F
    return all(math.isfinite(end) for end in torch.aminmax(tensor))  # either is NaN where a value is


def w4a4_part(leaves: dict[str, Tensor], rows: int, columns: int, unsigned: bool = False) -> tuple[Part, Tensor]:
    """One W4A4 layer of a file (tensors by v2 name: qweight, wscales, smooth_factor, proj_down, proj_up, bias, and
    wtscale and wcscales of nvfp4) -> its part and its bias [rows], both in natural order, cropped to [rows, columns]
    and in memory of their own.

    Precision is the dtype of wscales, rank the width of proj_down. Raises ValueError for a missing leaf, a
    wrong dtype or shape, values that are not finite or a smooth factor of zero.
    """
    from . import packing

    scales = leaves.get("wscales")
    fp4 = scales is not None and str(scales.dtype) == "torch.float8_e4m3fn"
    kind = "nvfp4" if fp4 else "int4"
    if columns % GROUP[kind]:
        raise ValueError(f"{columns} columns are no multiple of {GROUP[kind]}, the group of {kind}")
    n, k = ceil_to(rows, 128), ceil_to(columns, 128)
    codes = _check(leaves, "qweight", ("int8",), (n, k // 2))
    stored = _check(leaves, "wscales", ("float8_e4m3fn",) if fp4 else HALF, (k // GROUP[kind], n))
    smooth = _check(leaves, "smooth_factor", HALF, (k,))
    rank = leaves["proj_down"].shape[-1] if "proj_down" in leaves else 0
    if rank < 16 or rank % 16:
        raise ValueError(f"proj_down is {'of rank ' + str(rank) if rank else 'missing'}, expected a multiple of 16")
    down = _check(leaves, "proj_down", HALF, (k, rank))
    up = _check(leaves, "proj_up", HALF, (n, rank))
    bias = _check(leaves, "bias", HALF, (n,))
    if unsigned and fp4:
        raise ValueError("NVFP4 layers have no unsigned activations")
    if fp4:
        scale = packing.unpack_micro_scales(stored)[:rows, :columns // 16]
        fields = _fp4_scales(leaves, rows, n)
    else:
        if "wtscale" in leaves or "wcscales" in leaves:
            raise ValueError("wtscale or wcscales beside INT4 weights: these belong to NVFP4")
        scale, fields = packing.unpack_scales(stored)[:columns // 64, :rows], dict[str, Any]()
    smooth = packing.unpack_vector(smooth)[:columns]
    if not bool((smooth != 0).all()):
        raise ValueError("smooth_factor has zeros: activations are divided by it")
    part = Part(kind, packing.unpack_qweight(codes)[:rows, :columns // 2].contiguous(), scale.contiguous(),
                smooth=smooth.contiguous(), down=packing.unpack_down(down)[:columns].contiguous(),
                up=packing.unpack_up(up)[:rows].contiguous(), unsigned=unsigned)
    return replace(part, **fields), packing.unpack_vector(bias)[:rows].contiguous()


def _fp4_scales(leaves: dict[str, Tensor], rows: int, n: int) -> dict[str, Any]:
    """The second-level scales of nvfp4: a missing wtscale is 1.0, a missing wcscales ones
    (docs/formats/svdquant-nvfp4.md)."""
    import torch

    from . import packing

    fields = {"tensor_scale": torch.ones(())}
    if "wtscale" in leaves:
        scale = leaves["wtscale"]
        if scale.numel() != 1 or not math.isfinite(float(scale)):
            raise ValueError(f"wtscale is {scale.tolist()}, expected one finite value")
        fields["tensor_scale"] = torch.tensor(float(scale), dtype=torch.float32)
    if "wcscales" in leaves:
        stored = _check(leaves, "wcscales", HALF, (n,))
        fields["channel_scale"] = packing.unpack_vector(stored)[:rows].contiguous()
    return fields


def awq_part(leaves: dict[str, Tensor], rows: int, columns: int, interleaved: int = 0) -> tuple[Part, Tensor]:
    """One AWQ W4A16 layer (qweight, wscales, wzeros, bias) -> its part and its bias F32 or as stored [rows].

    Padded group rows are stripped. `interleaved` = S (3 or 6) undoes the order [D, S] of modulation rows and takes the
    folded 1 off the biases of index 1 and S - 2, in F32 (docs/sources/nunchaku.md, "Modulation"). The rank of the part
    is 0: a LoRA goes there. Both are in memory of their own. Raises ValueError as w4a4_part does.
    """
    import torch

    from . import packing

    if columns % 64 or rows % 4:
        raise ValueError(f"[{rows}, {columns}] is no AWQ shape: rows must be a multiple of 4 and columns of 64")
    groups = columns // 64
    padded = (ceil_to(groups, 16), rows)
    if interleaved and (interleaved not in (3, 6) or rows % interleaved):
        raise ValueError(f"{rows} rows do not interleave {interleaved} modulation vectors")
    codes = packing.unpack_awq(_check(leaves, "qweight", ("int32",), (rows // 4, columns // 2)), interleaved or 1)
    scale = _check(leaves, "wscales", HALF, padded)[:groups]
    zeros = _check(leaves, "wzeros", HALF, padded)[:groups]
    bias = _check(leaves, "bias", HALF, (rows,))
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
        raise ValueError(f"{part.rows} rows cannot be split into {list(counts)}")
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


def placed(part: Part, row: int, column: int) -> Part:
    """The same part at another place of the native weight."""
    return replace(part, row=row, column=column)


def native_tensors(name: str, parts: list[Part], bias: Tensor | None, shape: tuple[int, int]) -> dict[str, Tensor]:
    """State-dict entries of the native Linear `name` [rows, columns] that its parts make up, with this pack's marker.

    The parts are used up. `bias` [rows] is in natural order and as stored: with two parts on the same rows the sum of
    theirs. Raises ValueError unless the parts tile the weight.
    """
    check_tiling([place_of(part) for part in parts], shape)
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}, expected {[shape[0]]}")
    tensors = {}
    for i, part in enumerate(parts):
        for field, tensor in stored_fields(part).items():
            tensors[f"{name}.{leaf_name(field, i)}"] = tensor
    tensors[f"{name}.comfy_quant"] = marker([place_of(part) for part in parts])
    return tensors if bias is None else {**tensors, f"{name}.bias": bias}


def place_of(part: Part) -> Place:
    """Kind, size and place of a part."""
    return Place(part.kind, part.rows, part.columns, part.row, part.column, part.unsigned)


def stored_fields(part: Part) -> dict[str, Tensor]:
    """A part's tensors as layout.py holds them: natural order, but nvfp4 in the host's (high nibble first, rows padded
    to 16, block scales in 128 x 4 tiles), converted once here, its codes in place: the part is used up."""
    fields = {field: getattr(part, field) for field in FIELDS if getattr(part, field) is not None}
    if part.kind == "nvfp4":
        from .. import nvfp4
        from . import packing

        fields["codes"] = nvfp4.pad_rows(packing.swap_nibbles_(part.codes))
        fields["scale"] = packing.tile_micro_scales(part.scale)
    return fields


def leaf_name(field: str, index: int) -> str:
    """The state-dict leaf of a part's tensor: "weight", "weight_scale", and weight_<field>_<index> for the others."""
    if index == 0 and field in ("codes", "scale"):
        return "weight" if field == "codes" else "weight_scale"
    return f"weight_{field}_{index}"


def marker(places: Sequence[Place]) -> Tensor:
    """The `comfy_quant` tensor of a Linear with these parts."""
    from ..shards import marker as tensor

    return tensor({"format": FORMAT, **marker_conf(places)})


def marker_conf(places: Sequence[Place]) -> dict[str, Any]:
    """What the marker says beside its format."""
    return {"parts": [place._asdict() for place in places]}


def read_marker(stored: Tensor) -> list[Place] | None:
    """The places that a marker lists, or None when it is another format's. Raises ValueError for a broken one."""
    conf = json.loads(bytes(stored.tolist()))
    if conf.get("format") != FORMAT:
        return None
    try:
        places = [Place(**part) for part in conf["parts"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a {FORMAT} marker that does not list its parts: these tensors were not converted by this "
                         "pack; load the original file") from error
    if not places or any(place.kind not in GROUP for place in places):
        raise ValueError(f"a {FORMAT} marker of unknown parts")
    return places


def check_tiling(places: Sequence[Place], shape: tuple[int, int]) -> None:
    """Raises ValueError unless one or two parts tile a weight of this shape."""
    if not 0 < len(places) <= MAX_PARTS:
        raise ValueError(f"{len(places)} parts, this layout holds 1 to {MAX_PARTS}")
    text = ", ".join(f"[{p.rows}, {p.columns}] at row {p.row}, column {p.column}" for p in places)
    inside = all(p.row + p.rows <= shape[0] and p.column + p.columns <= shape[1] for p in places)
    a, b = places[0], places[-1]
    overlap = a is not b and a.row < b.row + b.rows and b.row < a.row + a.rows \
        and a.column < b.column + b.columns and b.column < a.column + a.columns
    if not inside or overlap or sum(p.rows * p.columns for p in places) != shape[0] * shape[1]:
        raise ValueError(f"parts {text} do not tile a weight of {list(shape)}")

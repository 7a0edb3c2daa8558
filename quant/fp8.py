"""FP8 E4M3 with one scale a tensor: ModelOpt FP8 and generic `fp8`.

Stored per Linear P (nvidia-modelopt 0.47 export, specs/modelopt.md section 2.2; SGLang's converter writes the same
with scales of shape [1]):

    P.weight        F8_E4M3 [out, in]    W = weight.float() * weight_scale
    P.weight_scale  F32     [] or [1]    weight amax / 448
    P.input_scale   F32     [] or [1]    activation amax / 448; absent means a dynamic scale, never 1.0
    P.bias          BF16    [out]

What the host gets: its own `float8_e4m3fn` layout where one weight scale holds for the whole module and the activation
scale is known; otherwise this pack's row shards (row_shards.py), which keep every shard's bytes and scale as stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .formats import PLAIN_DTYPES, Leaves, wrong_shape

if TYPE_CHECKING:
    from torch import Tensor

NATIVE = "float8_e4m3fn"
SHARDS = "qt.row_shards"  # this pack's marker; row_shards.py and ops.py implement it
MAX_SHARDS = 4  # q, k, v and proj_mlp of a FLUX single block
SHARD_LEAVES = tuple(f"weight_shard_{i}" for i in range(1, MAX_SHARDS))  # rows after those of "weight"


class FP8Format:
    """Per-tensor FP8 as a `formats.StoredFormat`."""

    name = "FP8"
    colour = (86, 178, 92)
    companions = frozenset({"weight_scale", "input_scale", "comfy_quant", *SHARD_LEAVES})

    def matches(self, leaves: Leaves) -> bool:
        scale = leaves.get("weight_scale")
        if "weight_shard_1" in leaves:
            return scale is not None and all(leaves[leaf].dtype in PLAIN_DTYPES | {"F8_E4M3"} for leaf in
                                             ("weight", *SHARD_LEAVES) if leaf in leaves)
        return leaves["weight"].dtype == "F8_E4M3" and "weight_scale_inv" not in leaves \
            and (scale is None or scale.dtype in PLAIN_DTYPES)

    def problem(self, leaves: Leaves, rows: int, columns: int) -> str:
        if "weight_scale" not in leaves:
            return ("FP8 weight without weight_scale (its values mean nothing without it; an unscaled FP8 cast loads "
                    "with ComfyUI's own Load Diffusion Model)")
        shards = [leaves[leaf].shape for leaf in ("weight", *SHARD_LEAVES) if leaf in leaves]
        for name, count in (("weight_scale", len(shards)), ("input_scale", 1)):
            scale = leaves.get(name)
            if scale is None:
                continue
            if scale.dtype not in PLAIN_DTYPES:
                return f"{name} is {scale.dtype}, expected F32"
            if tuple(scale.shape) not in (((), (1,)) if count == 1 else ((count,),)):
                expected = "one value" if count == 1 else f"{[count]}"
                return f"{name} is {list(scale.shape)}, expected {expected}; per-row and per-block FP8 do not load"
        if len(shards) > 1:
            fits = sum(shape[0] for shape in shards) == rows and all(shape[1:] == (columns,) for shape in shards)
            return "" if fits else f"row shards are {[list(s) for s in shards]}, expected {[rows, columns]} together"
        return wrong_shape(leaves, rows, columns)


FP8 = FP8Format()


@dataclass(frozen=True)
class Fused:
    """Native tensors of one module (leaf name → tensor) and how they came about, for the report."""

    tensors: dict[str, Tensor]
    layout: str
    dynamic: bool = False
    notes: tuple[str, ...] = ()


def _scale(name: str, part: dict[str, Tensor], leaf: str) -> Tensor | None:
    """A scale as F32 scalar. Raises ValueError unless it is finite and positive."""
    scale = part.get(leaf)
    if scale is None:
        return None
    value = float(scale)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}.{leaf} is {value}: a scale must be a finite positive number")
    return scale.float().reshape(())


def _full_precision(name: str, part: dict[str, Tensor]) -> bool:
    """Whether a Comfy marker of the stored layer asks for full-precision matmul. Raises ValueError if it is not FP8."""
    marker = part.get("comfy_quant")
    if marker is None:
        return False
    try:
        conf = json.loads(bytes(marker.tolist()))
    except ValueError as error:
        raise ValueError(f"{name}.comfy_quant is no JSON") from error
    if conf.get("format") not in (NATIVE, SHARDS):
        raise ValueError(f"{name}.comfy_quant says format {conf.get('format')!r} but the weight is FP8 E4M3")
    return bool(conf.get("full_precision_matrix_mult"))


def saved_shards(part: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One part for each row shard of a layer that was saved in this pack's layout; any other layer as it is."""
    import torch

    if "weight_shard_1" not in part:
        return [part]
    shared: dict[str, Tensor] = {leaf: part[leaf] for leaf in ("input_scale", "comfy_quant") if leaf in part}
    shards = [part[leaf] for leaf in ("weight", *SHARD_LEAVES) if leaf in part]
    return [{"weight": shard, **({"weight_scale": scale, **shared} if shard.dtype == torch.float8_e4m3fn else {})}
            for shard, scale in zip(shards, part["weight_scale"], strict=True)]


def marker(conf: dict[str, Any]) -> Tensor:
    """A `comfy_quant` tensor: the JSON of `conf` as U8, as the host stores it."""
    import torch

    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def fuse(names: list[str], parts: list[dict[str, Tensor]], *, swap_halves: bool = False,
         dequantize: bool = False) -> Fused:
    """Turn the stored parts of one native Linear (one, or q/k/v[/mlp] row shards) into native tensors.

    `parts` are leaf → tensor dicts in row order, at least one of them FP8; a part without weight_scale is a plain
    (BF16) shard. Bytes are never requantized. `swap_halves` exchanges the upper and lower half of the rows (single
    part only). `dequantize` asks the host for full-precision matmul on this module.

    Raises ValueError for a scale that is NaN, infinite, zero or negative, and for more than four shards.
    """
    import torch

    if len(parts) > MAX_SHARDS:
        raise ValueError(f"{names[0]}: {len(parts)} row shards, at most {MAX_SHARDS} are supported")
    named = list(zip(names, parts, strict=True))
    scales = [_scale(name, part, "weight_scale") for name, part in named]
    quantized = [scale for scale in scales if scale is not None]
    mixed = len(quantized) < len(parts)
    full_precision = dequantize or mixed or any([_full_precision(name, part) for name, part in named])
    notes: list[str] = []
    if mixed:
        notes.append(f"partly quantized group, multiplied in full precision: {', '.join(names)}")

    present = [scale for scale in (_scale(name, part, "input_scale") for name, part in named) if scale is not None]
    static = len(present) == len(quantized)
    tensors: dict[str, Tensor] = {}
    if static:
        tensors["input_scale"] = torch.stack(present).max()
        if any(not torch.equal(scale, present[0]) for scale in present):
            notes.append(f"different input scales in one group, the largest is used: {', '.join(names)}")
    elif present:
        notes.append(f"input scale missing in a part of the group, dynamic for all of it: {', '.join(names)}")

    weights = [part["weight"] for part in parts]
    if swap_halves:
        weights = [swap_rows(weights[0])]
    conf: dict[str, Any] = {"full_precision_matrix_mult": True} if full_precision else {}
    agree = not mixed and all(torch.equal(scale, quantized[0]) for scale in quantized)
    if agree and (static or full_precision):
        layout = NATIVE
        tensors["weight"] = join_rows(weights)
        tensors["weight_scale"] = quantized[0]
    else:
        layout = SHARDS
        if agree:
            weights = [join_rows(weights)]
        one = torch.ones(())
        tensors["weight_scale"] = torch.stack([one if s is None else s for s in scales[:len(weights)]])
        for i, weight in enumerate(weights):
            tensors[f"weight_shard_{i}" if i else "weight"] = weight
    tensors["comfy_quant"] = marker({"format": layout, **conf})
    return Fused(tensors, layout, dynamic=not static and not full_precision, notes=tuple(notes))


def join_rows(parts: list[Tensor]) -> Tensor:
    """One tensor of all parts' rows: the stored view itself for a single part, one copy for several."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts)


def swap_rows(tensor: Tensor) -> Tensor:
    """Exchange the upper and lower half of the rows (diffusers' scale|shift against the vendor's shift|scale)."""
    import torch

    return torch.cat(tuple(reversed(tensor.chunk(2))))

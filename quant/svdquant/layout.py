"""The host tensor layout of SVDQuant and AWQ linears: one or two parts that tile a weight, each with its own scales,
smoothing and low-rank pair.

All that is large lives in Params, so that the host's memory management moves, pins, streams and saves it. Deletable
the day the host takes SVDQuant weights of its own, with parts side by side and an unsigned flag.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from comfy_kitchen import dequantize_nvfp4
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from ..nvfp4 import ceil_to
from .held import Held, natural
from .parts import FIELDS, GROUP, MAX_PARTS, SHIFT, Part, Place, leaf_name

NAME = "QTSVDQuantLayout"




class SVDQuantLayout(QuantizedLayout):
    """One or two parts. `_qdata` is the codes of the first, `Params.scale` its scales."""

    QUANTIZES_INPUT = False  # each part quantizes the activation its own way

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`delta` [rows, columns] is what patches that are no plain LoRA add, in `orig_dtype`."""

        zeros_0: Tensor | None = None
        tensor_scale_0: Tensor | None = None
        channel_scale_0: Tensor | None = None
        smooth_0: Tensor | None = None
        down_0: Tensor | None = None
        up_0: Tensor | None = None
        codes_1: Tensor | None = None
        scale_1: Tensor | None = None
        zeros_1: Tensor | None = None
        tensor_scale_1: Tensor | None = None
        channel_scale_1: Tensor | None = None
        smooth_1: Tensor | None = None
        down_1: Tensor | None = None
        up_1: Tensor | None = None
        delta: Tensor | None = None
        places: tuple[Place, ...] = ()
        backend: str = "dequantize"
        native_fp4: bool = False
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]

    @classmethod
    def quantize(cls, tensor: Tensor, **_options: Any) -> tuple[Tensor, Params]:
        raise NotImplementedError("SVDQuant weights come from calibration; a weight cannot be quantized to them here")

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The effective weight in `orig_dtype`: the parts' (q * scales) / smooth + up @ down.T, plus delta, in F32.

        A plain matmul with it needs, for unsigned parts, the bias that `plain_shift` corrects.
        """
        rows, columns = reversed(params.orig_shape) if params.transposed else params.orig_shape
        out = torch.zeros(rows, columns, dtype=torch.float32, device=qdata.device)
        for held in held_parts(qdata, params):
            part = natural(held)
            place = out[part.row:part.row + part.rows, part.column:part.column + part.columns]
            place.copy_(residual(part))
            if part.down is not None and part.up is not None and part.down.shape[1]:
                place.addmm_(part.up.float(), part.down.float().t())
        if params.delta is not None:
            out += params.delta
        return out.to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """Key suffix after "weight" -> tensor, as ops.py reads them back. Codes go as a view in E4M3: where layers are
        not in VRAM, the save nodes of ComfyUI 0.30 make a Parameter of each tensor, which integers cannot be."""
        tensors = {leaf_name(field, i).removeprefix("weight"):
                   tensor.view(torch.float8_e4m3fn) if field == "codes" else tensor
                   for i, held in enumerate(held_parts(qdata, params))
                   for field, tensor in held._asdict().items() if isinstance(tensor, Tensor)}
        return tensors if params.delta is None else {**tensors, "_delta": params.delta}


register_layout_class(NAME, SVDQuantLayout)


def params_fields(parts: list[Held]) -> dict[str, Any]:
    """The Params fields of all parts: everything but the codes of the first, and the places."""
    out: dict[str, Any] = {"places": tuple(held.place for held in parts)}
    for i, held in enumerate(parts):
        for field in FIELDS:
            if (i, field) != (0, "codes"):
                out["scale" if (i, field) == (0, "scale") else f"{field}_{i}"] = getattr(held, field)
    return out


def held_parts(qdata: Tensor, params: SVDQuantLayout.Params) -> list[Held]:
    """The parts of a weight."""
    first = Held(params.places[0], qdata, params.scale,
                 *(getattr(params, f"{field}_0") for field in FIELDS[2:]))
    if len(params.places) < MAX_PARTS:
        return [first]
    return [first, Held(params.places[1], *(getattr(params, f"{field}_1") for field in FIELDS))]


def codes_of(stored: Tensor, place: Place) -> Tensor:
    """The codes of a part as `parts.native_tensors` or, in a saved file, `state_dict_tensors` gave them -> integers."""
    integers = torch.uint8 if not place.packed else torch.int32 if place.kind == "awq" else torch.int8
    return stored.view(integers) if stored.dtype == torch.float8_e4m3fn else stored


def with_parts(weight: QuantizedTensor, parts: list[Held], **changes: Any) -> QuantizedTensor:
    """The weight with other parts (same tiling), as a parameter; `changes` replace further Params fields."""
    params = weight._params
    kept = {name: getattr(params, name) for name in ("orig_dtype", "orig_shape", "delta", "backend", "native_fp4",
                                                      "transposed")}
    return parameter(parts[0].codes, SVDQuantLayout.Params(**{**kept, **params_fields(parts), **changes}))


def parameter(qdata: Tensor, params: SVDQuantLayout.Params) -> QuantizedTensor:
    """A weight parameter. What torch.nn.Parameter() does for tensor subclasses, less the detach(): kitchen's detach
    clones every tensor in Params."""
    weight = QuantizedTensor(qdata, NAME, params)
    weight._is_param = True
    return weight


def is_svdquant(weight: object) -> bool:
    """Whether a weight is of this layout."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME




def residual(part: Part) -> Tensor:
    """The quantized weight without its low-rank pair, F32 [N, K]: (q * scales) / smooth, by definition."""
    if part.kind == "nvfp4":
        weight = _fp4_residual(part)
    else:
        pairs = torch.stack((part.codes & 15, part.codes >> 4), -1).view(part.rows, -1, GROUP[part.kind])
        codes = pairs.float() if part.kind == "awq" else (pairs ^ 8).float() - 8  # a two's complement nibble: -8..7
        codes *= part.scale.float().t()[..., None]
        if part.zeros is not None:
            codes += part.zeros.float().t()[..., None]
        weight = codes.view(part.rows, part.columns)
    if part.smooth is not None:
        weight /= part.smooth.float()
    return weight


def _fp4_residual(part: Part) -> Tensor:
    from ..nvfp4 import pad_rows, swap_nibbles, swizzle

    assert part.tensor_scale is not None
    weight = dequantize_nvfp4(pad_rows(swap_nibbles(part.codes)), part.tensor_scale.float(), swizzle(part.scale),
                              torch.float32)[:part.rows]
    if part.channel_scale is not None:
        weight = weight * part.channel_scale.float()[:, None]
    return weight


def plain_shift(weight: Tensor) -> Tensor:
    """What a plain matmul adds to the stored bias of an unsigned layer, F32 [N]
    (docs/sources/nunchaku.md, "Unsigned activations"): 0.171875 * rowsum(residual)."""
    return weight.sum(1) * SHIFT


def check_held(held: Held, name: str) -> None:
    """Raises ValueError unless the tensors of a part have the dtypes and shapes of this layout: raw nunchaku tensors
    have the same shapes as converted ones, so codes must be U8."""
    p = held.place
    if p.packed:
        from .held import padded_sizes

        n, k = padded_sizes(p)
    else:
        n, k = (ceil_to(p.rows, 16) if p.kind == "nvfp4" else p.rows), p.columns
    expected: dict[str, tuple[int, ...]] = {"codes": (n, k // 2)}
    if p.packed and p.kind == "awq":
        expected["codes"] = (n // 4, k // 2)
    elif p.kind != "nvfp4":
        expected["scale"] = (k // 64, n)
    if p.kind != "awq":
        expected["smooth"] = (k,)
    rank = held.down.shape[-1] if held.down is not None else 0
    expected |= {"down": (k, rank), "up": (n if p.packed else p.rows, rank)}
    codes = torch.int32 if p.packed and p.kind == "awq" else torch.int8 if p.packed else torch.uint8
    for field, shape in expected.items():
        tensor = getattr(held, field)
        if tensor is None or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {field} is {list(tensor.shape) if tensor is not None else 'missing'}, "
                             f"expected {list(shape)}")
    if held.codes.dtype != codes:
        raise ValueError(f"{name}: codes are {held.codes.dtype}, expected {codes}: unconverted nunchaku tensors are "
                         "not what this layout holds")
    needs = {"nvfp4": held.tensor_scale, "awq": held.zeros}.get(p.kind, held.scale)
    if needs is None or held.scale is None:
        raise ValueError(f"{name}: scales of {p.kind} are missing")


"""The stored tensors of one ModelSlim layer -> a tile (schemes.py says which types exist)."""

from __future__ import annotations

import torch

from ...host.texts import Text
from ..scales import FINITE, checked, positive
from ..tile import Coded, Place, Tile
from . import integers, mx
from .kinds import KINDS

Part = dict[str, torch.Tensor]


def coded(kind: str, name: str, part: Part, bias: bool) -> Coded:
    """Read the layer. Raises ValueError for scales and offsets that mean nothing; see schemes.Scheme.coded."""
    weight = KINDS[kind].codec
    mul, notes = smoothing(name, part), []
    data, own = _static(name, part) if kind == "w8a8" else _codes(kind, name, part)
    rows, columns = data.shape[0], data.shape[1] * (2 if weight in ("int4", "mxfp4", "mxfp4_dual") else 1)
    kept = _bias_of_static(name, part, data, own, bias) if kind == "w8a8" else float_bias(name, part, bias)
    if mul is not None:
        own["mul"] = mul
        notes.append(Text("{name}: activations are multiplied by its smoothing vector", name=name))
    return Coded((Tile(Place(kind, rows, columns), {"codes": data, **own}),), kept, notes=tuple(notes))


def smoothing(name: str, part: Part) -> torch.Tensor | None:
    """The smoothing vector as F32 [columns], or None when there is none or it is all ones."""
    mul = part.get("mul_scale")
    if mul is None or bool((mul == 1).all()):
        return None
    if bool((checked(f"{name}.mul_scale", mul, FINITE) == 0).any()):
        raise ValueError(Text("{name}.mul_scale holds zeros", name=name))
    return mul.float()


def float_bias(name: str, part: Part, wanted: bool) -> torch.Tensor | None:
    """The stored bias of a module that has one. Raises ValueError for a bias where the model has none."""
    stored = part.get("bias")
    if not wanted and stored is not None and bool((stored != 0).any()):
        raise ValueError(Text("{name}.bias is stored but this layer of the model has none", name=name))
    return stored if wanted else None


def _codes(kind: str, name: str, part: Part) -> tuple[torch.Tensor, Part]:
    """Codes as the layout keeps them, and its other tensors, for every kind but static W8A8."""
    weight, scale, codec = part["weight"], part["weight_scale"], KINDS[kind].codec
    own: Part = {}
    if codec.startswith("mx"):
        own["scale"] = scale.view(torch.uint8)
        if codec != "mxfp8" and weight.dtype == mx.E4M3:  # old writers kept the E2M1 numbers in E4M3
            values = weight.float()
            weight = mx.pack(mx.encode_e2m1(values, False))
            if not torch.equal(mx.decode_e2m1(mx.unpack(weight)), values):
                raise ValueError(Text("{name}.weight is E4M3 with values that are not E2M1 numbers", name=name))
        if codec == "mxfp4_dual":
            own["dual"] = part["weight_dual_scale"].float().reshape(scale.shape[0], -1)
        return weight.view(torch.uint8) if codec != "mxfp8" else weight, own
    own["scale"] = positive(f"{name}.weight_scale", scale.reshape(scale.shape[0], -1))
    offset = part.get("weight_offset")
    if offset is not None and bool((offset != 0).any()):
        if KINDS[kind].activation:
            raise ValueError(Text("{name}.weight_offset is not zero; integer matmuls of an NPU ignore it", name=name))
        own["offset"] = offset.float().reshape(offset.shape[0], -1).expand(own["scale"].shape).contiguous()
    if codec == "int4":
        if weight.shape[0] != scale.shape[0]:
            weight = integers.unpack_rows(weight)
        elif bool(((weight < -8) | (weight > 7)).any()):
            raise ValueError(Text("{name}.weight has values outside -8..7", name=name))
        weight = mx.pack(weight)
    return weight, own


def _static(name: str, part: Part) -> tuple[torch.Tensor, Part]:
    """Codes and activation scales of static W8A8."""
    deq = positive(f"{name}.deq_scale", integers.deq_scale(part["deq_scale"]))
    scale = positive(f"{name}.input_scale", part["input_scale"].reshape(()))
    offset = part["input_offset"].float().reshape(())
    if not -128 <= float(offset) <= 127 or float(offset) != int(offset):
        raise ValueError(Text("{name}.input_offset is {offset}, expected a whole number from -128 to 127", name=name,
                              offset=float(offset)))
    return part["weight"], {"scale": deq, "input_scale": scale, "input_offset": offset}


def _bias_of_static(name: str, part: Part, codes: torch.Tensor, own: Part, wanted: bool) -> torch.Tensor | None:
    """Complete `own` with quant_bias, and return the float bias for the host: one made from the other if need be.

    quant_bias = round(bias / deq_scale) - input_offset * (sum of a row's codes). An NPU adds quant_bias only.
    """
    sums = own["input_offset"].double() * codes.sum(1, dtype=torch.int64)
    deq = own["scale"][:, 0].double()
    kept = float_bias(name, part, wanted)
    stored = part.get("quant_bias")
    if stored is None:
        bias = torch.zeros_like(deq) if kept is None else kept.double()
        stored = ((bias / deq).round() - sums).round().to(torch.int32)
    elif wanted and kept is None:
        kept = ((stored + sums) * deq).float()
    own["quant_bias"] = stored
    if kept is not None:
        own["bias"] = kept
    return kept

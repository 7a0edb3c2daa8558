"""One weight as E4M3 with its scales: how its tensors are made when their turn comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .component import Component, Memory, in_spans
from .output import Plan, module_of

if TYPE_CHECKING:
    from torch import Tensor

HELD = 128 << 20  # bytes of a weight that is kept between the two looks at it; a larger one is read again


class Scales(NamedTuple):
    """Scales of one layer, F32 [1]; `own` says that the export carries them beside the weight."""

    weight: Tensor
    input: Tensor
    own: bool = True


def add_scaled(plan: Plan, source: Component, name: str, scales: Scales) -> None:
    """A weight with known scales; one that is E4M3 keeps its bytes."""
    info, module = source.tensors[name], module_of(name)

    def make(memory: Memory) -> dict[str, Tensor]:
        from ...quant.convert.fp8 import quantize

        if info.dtype == "F8_E4M3":
            codes = source.read(name, memory)
        else:
            codes = memory.empty(info.shape, "F8_E4M3")
            flat = codes.view(-1)
            source.each_span(name, lambda start, part, amax: quantize(part, scales.weight,
                                                                      flat[start:start + part.numel()], amax))
        return {name: codes, f"{module}.weight_scale": scales.weight, f"{module}.input_scale": scales.input}

    plan.add(module, [(name, "F8_E4M3", info.shape), (f"{module}.weight_scale", "F32", (1,)),
                      (f"{module}.input_scale", "F32", (1,))], make)


def add_measured(plan: Plan, source: Component, name: str, maxbound: float) -> None:
    """A weight whose scale is its own amax / maxbound, without an activation scale."""
    info, module = source.tensors[name], module_of(name)

    def make(memory: Memory) -> dict[str, Tensor]:
        from ...quant.convert.fp8 import quantize, scale_of

        codes = memory.empty(info.shape, "F8_E4M3")
        flat = codes.view(-1)
        if info.end - info.start > HELD:
            amax = source.amax(name)
            scale = scale_of(amax, maxbound)
            source.each_span(name, lambda start, part, _: quantize(part, scale, flat[start:start + part.numel()], amax),
                             amax)
        else:
            plan.held.reuse(info.end - info.start)
            weight, amax = source.read_amax(name, plan.held)
            scale, values = scale_of(amax, maxbound), weight.view(-1)
            in_spans(values.numel(), lambda start, count: quantize(values[start:start + count], scale,
                                                                   flat[start:start + count], amax))
        return {name: codes, f"{module}.weight_scale": scale}

    plan.add(module, [(name, "F8_E4M3", info.shape), (f"{module}.weight_scale", "F32", (1,))], make)

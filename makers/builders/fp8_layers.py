"""One weight as E4M3 with its scales: how its tensors are written when their turn comes.

A weight whose scale is measured is read twice, by spans that stay in the processor's cache: the second time costs less
than memory to keep it in, and nothing has to hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...loaders.containers.writing import Declared, Parts, Put
from .component import Component, scratch
from .output import Plan, Write, module_of

if TYPE_CHECKING:
    from torch import Tensor


class Scales(NamedTuple):
    """Scales of one layer, F32 [1]; `own` says that the export carries them beside the weight."""

    weight: Tensor
    input: Tensor
    own: bool = True


def add_scaled(plan: Plan, source: Component, name: str, scales: Scales) -> None:
    """A weight with known scales; one that is E4M3 keeps its bytes."""
    module = module_of(name)

    def write(put: Put) -> Parts:
        yield put(f"{module}.weight_scale", 0, scales.weight)
        yield put(f"{module}.input_scale", 0, scales.input)
        if source.tensors[name].dtype == "F8_E4M3":
            yield from source.copy(name, put)
        else:
            yield from _quantized(source, name, scales.weight, None, put)

    plan.add(module, [*_weight(source, name), Declared(f"{module}.input_scale", "F32", (1,))], lambda: write)


def add_measured(plan: Plan, source: Component, name: str, maxbound: float) -> None:
    """A weight whose scale is its own amax / maxbound, without an activation scale."""
    module = module_of(name)

    def begin() -> Write:
        from ...quant.convert.fp8 import scale_of

        amax = source.amax(name)
        scale = scale_of(amax, maxbound)

        def write(put: Put) -> Parts:
            yield put(f"{module}.weight_scale", 0, scale)
            yield from _quantized(source, name, scale, amax, put)

        return write

    plan.add(module, _weight(source, name), begin)


def _weight(source: Component, name: str) -> list[Declared]:
    return [Declared(name, "F8_E4M3", source.tensors[name].shape), Declared(f"{name}_scale", "F32", (1,))]


def _quantized(source: Component, name: str, scale: Tensor, amax: float | None, put: Put) -> Parts:
    """The codes of a float weight; its `amax`, where that is known."""
    import torch

    from ...quant.convert.fp8 import quantize

    def use(start: int, part: Tensor, largest: float) -> int:
        codes = scratch("codes", part.numel(), torch.float8_e4m3fn)
        return put(name, start, quantize(part, scale, codes, largest))

    return source.spans(name, use, amax)

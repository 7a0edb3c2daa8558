"""A plan, and what the user wants -> native tensors, and the host's operations that load and run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import host
from . import damage
from .assemble import NativeStateDict, assemble
from .containers.checkpoint import Checkpoint
from .families.base import Family
from .plan import LoadPlan


def check(family: Family, plan: LoadPlan) -> None:
    """Raise CheckpointError for quantized layers that cannot run here, before any tensor is read."""
    from ..quant.codecs import codec

    host.require(*sorted({codec(name).feature for name in plan.codecs} - {""}))
    family.check(plan)


def prepare(family: Family, checkpoint: Checkpoint, plan: LoadPlan, wanted: Any,
            step: Callable[[], None] = lambda: None, dtype: Any = None) -> tuple[NativeStateDict, Any]:
    """The native tensors of a checkpoint that was read as loadable, and the host's operations for them (None: the
    usual). `wanted` is a kernels.choose.Wanted, `step` is called once a module, `dtype` is the compute dtype that is
    asked for, if one is.

    What was chosen goes into the tensors' `runs` and `notes`. Raises CheckpointError for what cannot run here, before
    any tensor is read, and for tensors that mean nothing or are left over.
    """
    quantized = any(piece.layer.read for planned in plan.modules for piece in planned.pieces)
    if not quantized:
        return assemble(plan, family.tensors(checkpoint, plan), step=step), None
    from ..quant.codecs import codec
    from ..quant.kernels import kernel
    from ..quant.kernels.choose import choose, here
    from ..quant.linear import with_tiles_of

    check(family, plan)
    choice = choose(wanted, plan.codecs, here(plan.codecs))
    own = {name for name, run in choice.kernels.items() if kernel(run).own_layout}
    at_load = any(kernel(run).at_load for run in choice.kernels.values())
    native = assemble(plan, family.tensors(checkpoint, plan), dequantize=wanted.compute == "dequantize", own=own,
                      step=step, refuses=lambda tile: kernel(choice.kernels.get(tile.place.codec, "")).refuses(tile),
                      deep=at_load or damage.at_load())
    native.runs += [*family.runs(plan, wanted.compute), *choice.lines]
    native.notes += choice.notes
    if not native.layouts:
        return native, None
    if dtype is not None and at_load:
        return native, with_tiles_of(host.mixed_operations_in(dtype), choice.kernels, loaded=native.copied)
    # Where the host has a matmul off, its own layouts are multiplied with it all the same, if that is wanted.
    keep = wanted.compute == "native" and any(codec(name).requantizes for name in plan.codecs)
    return native, with_tiles_of(host.mixed_operations(native.tensors, native=keep), choice.kernels,
                                 loaded=native.copied)

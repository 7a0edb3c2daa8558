"""What the host tells about a MODEL with quantized weights: that it has loaded it, and that it has changed hooks."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comfy_kitchen.tensor import QuantizedTensor

from .factors import factors
from .stand_ins import stand_in

CALLBACK = "qt.patches"
logger = logging.getLogger(__name__)
_told: deque[Any] = deque(maxlen=16)  # the sets of patches that the log has been told of


@dataclass(frozen=True)
class Hooked:
    """What hooks change of a weight (called `key` by the host) and its bias, while they are those of the patcher."""

    patcher: weakref.ref[Any]
    hooks: Any
    key: str
    weight: list[tuple]
    bias: list[tuple]

    @property
    def active(self) -> bool:
        """Whether the host has these hooks on at present: it takes them off without a word."""
        from ... import host

        patcher = self.patcher()
        return patcher is not None and host.are_hooked(patcher, self.hooks)


def pending(functions: Iterable[Any]) -> list[Any]:
    """Those of a module's weight functions that are patches the host left beside the weight."""
    return [f for f in functions if getattr(f, "is_lowvram_patch", False)]


def patches_of(function: Any) -> list[tuple]:
    """The patches of one of them: those already brought to the device, or the patcher's own."""
    prepared = function.prepared_patches
    return function.patches[function.key] if prepared is None else prepared


def attach(patcher: Any) -> None:
    """Keep patches of a MODEL's quantized weights beside them whatever the host does; its clones inherit this."""
    from ... import host

    if not host.lacking("LoRA beside the weight"):
        host.call_back(patcher, CALLBACK, on_load, on_apply_hooks)


def on_load(patcher: Any, *_: Any) -> None:
    """After a load of the model: what is beside which weights is logged once for every set of patches."""
    from ... import host

    host.forget_forced_casts(patcher)
    told, beside, dense, size = host.patch_set(patcher) in _told, 0, 0, 0
    for name, module in patcher.model.named_modules():
        if not hasattr(module, "after_load"):
            continue
        module.after_load()
        host.add_loaded(patcher, module.grown)
        module.grown = 0
        patches = patcher.patches.get(f"{name}.weight")
        if patches and not told and module.is_quantized():
            found = factors(patches, module.weight.shape)
            beside, dense = beside + (found is not None), dense + (found is None)
            size += sum(one.elements for one in found or ()) * module.weight.dtype.itemsize
    if beside or dense:
        _told.append(host.patch_set(patcher))
        other = f"; {dense} have other patches and are dense for as long" if dense else ""
        logger.info("Patches of quantized layers: %d have a LoRA beside their weight (%.1f MB)%s.", beside,
                    size / 2 ** 20, other)


def on_apply_hooks(patcher: Any, hooks: Any) -> None:
    """After the host has put hooks into the weights, or taken them off: quantized ones have been left alone."""
    from ... import host

    found = {} if hooks is None else host.hook_patches(patcher, hooks)
    for name, module in patcher.model.named_modules():
        if not hasattr(module, "hooked"):
            continue
        if module.hooked is not None:
            module.hooked = None
            module.after_load()
        weight, bias = (found.get(f"{name}.{leaf}", []) for leaf in ("weight", "bias"))
        if not weight and not bias:
            continue
        quantized, shifts = isinstance(module.weight, QuantizedTensor), module.shifts()
        own = Hooked(weakref.ref(patcher), hooks, f"{name}.weight", weight if quantized else [], bias if shifts else [])
        if own.weight or own.bias:
            module.hooked = own
            for leaf, patches in (("weight", own.weight), ("bias", own.bias)):
                if patches:
                    host.forget_hook_backup(patcher, f"{name}.{leaf}", stand_in(getattr(module, leaf)))
            module.after_load()

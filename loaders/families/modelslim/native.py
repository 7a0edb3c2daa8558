"""A described ModelSlim checkpoint -> native tensors and the operations that load them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .... import host
from ....quant.ascend.fused import fused
from ....quant.ascend.schemes import SCHEMES
from ....quant.stored import MODELOPT_ORDER, PLAIN, PLAIN_DTYPES
from ...architectures import ARCHITECTURES, Module
from ...assemble import NativeStateDict, add_module, finish, take
from ...containers.checkpoint import Checkpoint
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...words import first_ten
from .. import running
from ..base import How
from .description import FLOAT
from .names import plain_names

if TYPE_CHECKING:
    from torch import Tensor


def prepare(checkpoint: Checkpoint, description: CheckpointDescription, how: How) -> tuple[NativeStateDict, Any]:
    """Native tensors of a checkpoint that `describe` found loadable, and the host's operations for them.

    Raises CheckpointError for a format that this host does not have, for scales that mean nothing and for tensors that
    nothing used.
    """
    host.require("Ascend")
    architecture = next(a for a in ARCHITECTURES if a.name == description.architecture)
    where = checkpoint.source.reference
    stored, _, _ = plain_names(checkpoint.load_tensors(), where)
    native = NativeStateDict()
    compute = how.compute
    layouts: set[str] = set()
    for module in architecture.modules(description.dims, description.naming):
        try:
            layouts.add(_add(native, module, stored, description, compute == "dequantize"))
        except ValueError as error:
            raise CheckpointError(str(error), where, "copy the export again, or report it to its publisher") from error
        how.step()
    finish(native, architecture, description.dims, description.naming, stored, where)
    layouts.discard("")
    native.notes = _summary(native.notes)
    native.words = layouts
    return native, running.operations(native, how, where)


def _add(native: NativeStateDict, module: Module, stored: dict[str, Tensor], description: CheckpointDescription,
         dequantize: bool) -> str:
    """Move the tensors of one module out of `stored` and return its layout's name, "" for a plain one.

    Raises ValueError where a scheme refuses the tensors.
    """
    kinds = {description.layers.get(name, PLAIN.name) for name in module.stored}
    if kinds <= PLAIN_DTYPES and not any(f"{name}.mul_scale" in stored for name in module.stored):
        add_module(native, module, [take(stored, name, module) for name in module.stored], MODELOPT_ORDER,
                   dequantize=False, own_nvfp4=False)
        return ""
    scheme = SCHEMES[FLOAT if kinds <= PLAIN_DTYPES else kinds.pop()]  # layers.py refuses mixed types
    parts = []
    for name in module.stored:
        part = {leaf: stored.pop(f"{name}.{leaf}") for leaf in sorted({"weight", "bias", *scheme.leaves})
                if f"{name}.{leaf}" in stored}
        if "quant_bias" in part and "bias" in part:
            native.notes += _check_quant_bias(name, part)
        parts.append(part)
    whole = fused(list(module.stored), parts, module.swap_halves) if len(parts) > 1 or module.swap_halves else parts[0]
    layer = scheme.tensors(module.stored[0], whole, bias=module.bias)
    if layer.layout and dequantize:
        layer.tensors["comfy_quant"] = running.dequantized({"format": layer.layout})
    native.tensors |= {f"{module.native}.{leaf}": tensor for leaf, tensor in layer.tensors.items()}
    native.notes += layer.notes
    return layer.layout


def _check_quant_bias(name: str, part: dict[str, Tensor]) -> list[str]:
    """Hold the two biases of a static W8A8 layer against each other, and drop `quant_bias` where it overflowed.

    quant_bias = round(bias / deq_scale) - input_offset * (sum of a row's codes). msmodelslim computes the quotient in
    the source's dtype, good to 2^-8 in BF16; in F16 it is infinite above 65504, and the integer made of that is noise.
    Raises ValueError for any other difference, which would be another layer's bias.
    """
    from ....quant.ascend.integers import deq_scale

    deq, bias = deq_scale(part["deq_scale"]).double().flatten(), part["bias"].double()
    sums = part["weight"].sum(1).double() * float(part["input_offset"])  # int64
    wrong = ((part["quant_bias"].double() + sums) * deq - bias).abs() > 2 ** -6 * bias.abs() + 4 * deq
    overflow = bias.abs() > 65000 * deq
    if bool((wrong & ~overflow).any()):
        raise ValueError(f"{name}: bias and quant_bias are of two different layers")
    if not bool(wrong.any()):
        return []
    del part["quant_bias"]
    return [f"{name}: quant_bias overflowed when it was exported (F16), made again from bias"]


def _summary(notes: list[str]) -> list[str]:
    """Notes "layer: text" with the same text as one line."""
    layers: dict[str, list[str]] = {}
    for note in notes:
        layer, _, text = note.partition(": ")
        layers.setdefault(text, []).append(layer)
    return [f"{text}: {len(names)} layers ({first_ten(names)})" for text, names in layers.items()]

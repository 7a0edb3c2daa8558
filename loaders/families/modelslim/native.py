"""A described ModelSlim checkpoint -> native tensors and the operations that load them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .... import host
from ....quant import host_formats
from ....quant.ascend.kinds import HOST_FORMAT, KINDS, MARKER
from ....quant.ascend.schemes import SCHEMES
from ....quant.host_formats import HOST_FORMATS
from ....quant.stored import MODELOPT_ORDER, PLAIN
from ...architectures import ARCHITECTURES, Module
from ...architectures.base import tensor_name
from ...assemble import NativeStateDict, add_module, take
from ...containers.checkpoint import Checkpoint
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...words import first_ten
from ..base import How
from . import saved
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
    _check_host(description)
    import torch

    from ....quant.ascend.ops import with_ascend

    architecture = next(a for a in ARCHITECTURES if a.name == description.architecture)
    where = checkpoint.source.reference
    stored, _, _ = plain_names(checkpoint.load_tensors(), where)
    native = NativeStateDict()
    compute = how.compute
    add = _add_saved if description.family in (saved.FAMILY, saved.HANDED) else _add
    layouts: set[str] = set()
    for module in architecture.modules(description.dims, description.naming):
        try:
            layouts.add(add(native, module, stored, description, compute == "dequantize"))
        except ValueError as error:
            raise CheckpointError(str(error), where, "copy the export again, or report it to its publisher") from error
        how.step()
    for mark in architecture.marks(description.dims):
        stored.pop(description.naming.prefix + mark, None)
        native.tensors[mark] = torch.zeros(0)
    if stored:
        raise CheckpointError(f"{len(stored)} stored tensors were not used: {first_ten(stored)}", where,
                              "report this; the checkpoint holds more than its architecture")
    layouts.discard("")
    if not layouts:
        return native, None
    ours = layouts - HOST_FORMATS.keys()
    backend, why = _backend(ours, compute) if ours else ("comfy_kitchen", "")
    native.notes = [*_summary(native.notes), *([why] if why else []), *_handed(description, compute)]
    return native, with_ascend(host.mixed_operations(native.tensors, native=compute == "native"), backend)


def _check_host(description: CheckpointDescription) -> None:
    """Raise CheckpointError for layers in a format that the host is to make sense of, and does not have."""
    for name in description.formats.keys() & host_formats.NAMES.keys():
        word = host_formats.NAMES[name]
        if word not in host.quantized_formats():
            raise CheckpointError(f"ComfyUI {host.version()} does not have the format {word!r}, which "
                                  f"{description.formats[name]} layers are in ({name})", description.reference,
                                  "update ComfyUI and its comfy-kitchen")


def _handed(description: CheckpointDescription, compute: str) -> list[str]:
    names = [name for name in description.formats if name in host_formats.NAMES]
    how = "dequantized for every matmul, as chosen" if compute == "dequantize" else "multiplied by ComfyUI itself"
    return [f"{' and '.join(names)}: {how}, on {host.device_name()}"] if names else []


def _add(native: NativeStateDict, module: Module, stored: dict[str, Tensor], description: CheckpointDescription,
         dequantize: bool) -> str:
    """Move the tensors of one module out of `stored` and return its layout's name, "" for a plain one.

    Raises ValueError where a scheme refuses the tensors.
    """
    kinds = {description.layers.get(name, PLAIN.name) for name in module.stored}
    if kinds == {PLAIN.name} and f"{module.stored[0]}.mul_scale" not in stored:
        add_module(native, module, [take(stored, name, module) for name in module.stored], MODELOPT_ORDER,
                   dequantize=False, own_nvfp4=False)
        return ""
    name, = module.stored  # layers.py refuses quantized and smoothed layers that the host fuses
    scheme = SCHEMES[FLOAT if kinds == {PLAIN.name} else kinds.pop()]
    part = {leaf: stored.pop(f"{name}.{leaf}") for leaf in sorted({"weight", "bias", *scheme.leaves})
            if f"{name}.{leaf}" in stored}
    if "quant_bias" in part and "bias" in part:
        native.notes += _check_quant_bias(name, part)
    layer = scheme.tensors(name, part, bias=module.bias)
    if layer.layout and dequantize:
        layer.tensors["comfy_quant"] = _dequantized({"format": layer.layout})
    native.tensors |= {f"{module.native}.{leaf}": tensor for leaf, tensor in layer.tensors.items()}
    native.notes += layer.notes
    return layer.layout


def _add_saved(native: NativeStateDict, module: Module, stored: dict[str, Tensor], description: CheckpointDescription,
               dequantize: bool) -> str:
    """As _add, for tensors that are the host's already."""
    import json

    name, layout = module.stored[0], ""
    leaves = (module.stored_leaf, "bias", *sorted(saved.LEAVES)) if module.linear else (module.stored_leaf, "bias")
    for leaf in leaves:
        if tensor_name(name, leaf) not in stored:
            continue
        tensor = stored.pop(tensor_name(name, leaf))
        if leaf == "comfy_quant":
            conf = json.loads(bytes(tensor.tolist()))
            layout = conf["format"]
            if dequantize:
                tensor = _dequantized(conf)
        native.tensors[tensor_name(module.native, module.leaf if leaf == module.stored_leaf else leaf)] = tensor
    return layout


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


def _dequantized(conf: dict[str, Any]) -> Tensor:
    """The marker of a layer that multiplies in full precision."""
    from ....quant.shards import marker

    return marker({**conf, "full_precision_matrix_mult": True})


def _summary(notes: list[str]) -> list[str]:
    """Notes "layer: text" with the same text as one line."""
    layers: dict[str, list[str]] = {}
    for note in notes:
        layer, _, text = note.partition(": ")
        layers.setdefault(text, []).append(layer)
    return [f"{text}: {len(names)} layers ({first_ten(names)})" for text, names in layers.items()]


def _backend(layouts: set[str], compute: str) -> tuple[str, str]:
    """Who multiplies, and a line for the report. Raises CheckpointError when "native" is impossible on this NPU.

    "native" off an NPU is comfy-kitchen where it multiplies these kinds quantized, else the reference, which does so
    anywhere, slowly.
    """
    from ....quant.ascend.backends import KITCHEN_RULES, choose_backend
    from ....quant.ascend.backends.torch_npu import device_facts

    of_host = {word: kind for kind, word in HOST_FORMAT.items()}
    kinds = sorted({of_host.get(word, word.removeprefix(MARKER)) for word in layouts})
    facts, wanted = device_facts(host.device_type()), "auto"
    if compute == "native":
        emulated = [kind for kind in kinds if kind in KITCHEN_RULES and not KINDS[kind].integer]
        blackwell = (host.capability() or (0, 0)) >= (10, 0)
        if blackwell:
            emulated = [kind for kind in emulated if kind != "w8a8_mxfp8"]
        wanted = "torch_npu" if facts.npu else "reference" if emulated else "comfy_kitchen"
    try:
        backend, why = choose_backend(wanted, kinds, facts)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if compute == "dequantize":
        return backend, "dequantized for every matmul, as chosen: weights stay quantized in memory"
    if backend == "comfy_kitchen" and compute == "auto" and not host.has_matmul("INT8"):
        off = [kind.upper() for kind in kinds if HOST_FORMAT.get(kind) == "int8_tensorwise"]
        why += "".join(f"; {kind} is dequantized for every matmul, because ComfyUI has INT8 off for this device"
                       for kind in off)
    return backend, f"backend {backend} on {host.device_name()}: {why}"

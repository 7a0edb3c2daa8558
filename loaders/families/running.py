"""How the layers of a load are going to run here: who multiplies, the operations for it, and the lines that say so."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ... import host
from ...quant.ascend.kinds import HOST_FORMAT, KINDS, MARKER
from ...quant.shards import ROW_SHARDS
from ...quant.svdquant.parts import FORMAT
from ..assemble import NativeStateDict
from ..description import CheckpointDescription
from ..errors import CheckpointError
from .base import How

if TYPE_CHECKING:
    from torch import Tensor

FROM_COMPUTE = {"auto": "auto", "native": "comfy_kitchen", "dequantize": "dequantize"}  # where a node has no `backend`


def operations(native: NativeStateDict, how: How, where: str, fp4: str | None = None) -> Any:
    """The host's operations for these native tensors: None, its own, when no layer is quantized; else its mixed ones
    with every format that `native` holds, multiplied as `how` says. What was chosen goes into `native.runs` and notes.

    `fp4` is FlashInfer's backend for NVFP4 row shards. Raises CheckpointError for a choice that cannot run here.
    """
    words = native.words | native.layouts.keys() | ({FORMAT} if native.part_kinds else set())
    if not words:
        return None
    from ...quant.operations import stacked

    ascend, svdquant, nvfp4 = "comfy_kitchen", "dequantize", None
    own = {word for word in native.words if word.startswith(MARKER) or word in HOST_FORMAT.values()}
    if own:
        ascend, why = ascend_backend(own, how.compute)
        native.notes += [why]
    if native.part_kinds:
        svdquant, line = svdquant_backend(how, native.part_kinds, where)
        native.runs.append(line)
    if fp4 is not None and ROW_SHARDS in words:
        from ...quant.flashinfer_fp4 import layout_name

        nvfp4 = layout_name(fp4)
    mixed = host.mixed_operations(native.tensors, native=how.compute == "native" and words != {FORMAT})
    return stacked(mixed, words, ascend=ascend, svdquant=svdquant, nvfp4=nvfp4, copied=native.copied)


def check_compute(compute: str, description: CheckpointDescription) -> None:
    """Raise CheckpointError when the compute choice is impossible on this device."""
    if compute == "native" and not host.is_cpu():
        for kind, needs in (("FP8", "SM 8.9"), ("NVFP4", "SM 10.0")):
            if kind in description.formats and not host.has_matmul(kind):
                raise CheckpointError(f"{host.device_name()} has no {kind} matrix multiplication (NVIDIA {needs} or "
                                      "newer has)", "", "set compute to 'auto' or 'dequantize'")


def fp4_backend(wanted: str, description: CheckpointDescription, compute: str) -> tuple[str | None, str]:
    """FlashInfer's backend for NVFP4 layers, or None for the host's kernels; and a line for the report."""
    if "NVFP4" not in description.formats:
        return None, f"fp4_backend {wanted} has no effect, there are no NVFP4 layers" if wanted != "auto" else ""
    if compute == "dequantize":
        return None, ""
    from ...quant.flashinfer_fp4 import choose

    return choose(wanted, host.capability())


def ascend_backend(layouts: set[str], compute: str) -> tuple[str, str]:
    """Who multiplies, and a line for the report. Raises CheckpointError when "native" is impossible on this NPU.

    "native" off an NPU is comfy-kitchen where it multiplies these kinds quantized, else the reference, which does so
    anywhere, slowly.
    """
    from ...quant.ascend.backends import KITCHEN_RULES, choose_backend
    from ...quant.ascend.backends.torch_npu import device_facts

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


def dequantized(conf: dict[str, Any]) -> Tensor:
    """The marker of a layer that multiplies in full precision."""
    from ...quant.shards import marker

    return marker({**conf, "full_precision_matrix_mult": True})


def svdquant_backend(how: How, kinds: Collection[str], where: str) -> tuple[str, str]:
    """(the back end for layers of these kinds on this device, a line that says why) for what the user wants.

    Raises CheckpointError when that back end cannot run here; with what to do instead.
    """
    host.require("SVDQuant")
    from ...quant.svdquant.backends import choose_backend
    from ...quant.svdquant.nunchaku_wheel import find

    wheel, wanted = find(), how.backend or FROM_COMPUTE[how.compute]
    try:
        backend, words = choose_backend(wanted, kinds, host.capability(), is_cpu=host.is_cpu(),
                                        gfx=host.amd_architecture(), nunchaku_problem=wheel.problem)
    except ValueError as error:
        raise CheckpointError(str(error), where, "set backend to 'auto'") from error
    why = "as chosen" if wanted == backend else "chosen for this device"
    line = f"backend: {backend} ({why}) on {host.device_name()}: {words}"
    return backend, f"{line}\nnote: {wheel.problem}" if wheel.version and wheel.problem else line

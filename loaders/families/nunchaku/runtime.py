"""How SVDQuant layers are going to run here: the back end, its operations, and the line for the report."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .... import host
from ...assemble import NativeStateDict
from ...errors import CheckpointError
from ..base import How

FROM_COMPUTE = {"auto": "auto", "native": "comfy_kitchen", "dequantize": "dequantize"}  # where a node has no `backend`


def choose(how: How, kinds: Collection[str], where: str) -> tuple[str, str]:
    """(the back end for layers of these kinds on this device, a line that says why) for what the user wants.

    Raises CheckpointError when that back end cannot run here; with what to do instead.
    """
    host.require("SVDQuant")
    from ....quant.svdquant.backends import choose_backend
    from ....quant.svdquant.nunchaku_wheel import find

    wheel, wanted = find(), how.backend or FROM_COMPUTE[how.compute]
    try:
        backend, words = choose_backend(wanted, kinds, host.capability(), is_cpu=host.is_cpu(),
                                        gfx=host.amd_architecture(), nunchaku_problem=wheel.problem)
    except ValueError as error:
        raise CheckpointError(str(error), where, "set backend to 'auto'") from error
    why = "as chosen" if wanted == backend else "chosen for this device"
    line = f"backend: {backend} ({why}) on {host.device_name()}: {words}"
    return backend, f"{line}\nnote: {wheel.problem}" if wheel.version and wheel.problem else line


def part_operations(native: NativeStateDict, how: How, where: str) -> Any:
    """The host's operations with Linears that run the SVDQuant parts among these tensors; says so in `native.runs`."""
    from ....quant.svdquant.ops import with_svdquant

    backend, line = choose(how, native.part_kinds, where)
    native.runs.append(line)
    return with_svdquant(host.mixed_operations(native.tensors), backend, native.copied)

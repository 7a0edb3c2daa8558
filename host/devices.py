"""The device that the host runs models on, its memory, and the progress of the node that runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .check import lacking, needs
from .texts import Text

if TYPE_CHECKING:
    import torch


@needs("devices")
def device_name() -> str:
    """The device the host runs models on, in words."""
    import comfy.model_management

    return comfy.model_management.get_torch_device_name(comfy.model_management.get_torch_device())


@needs("devices")
def compute_device() -> torch.device:
    """The device the host runs models on."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


@needs("devices")
def all_devices() -> list[torch.device]:
    """The devices that the host can share one model's work among; the one it runs models on where it does not say."""
    import comfy.model_management

    every = getattr(comfy.model_management, "get_all_torch_devices", None)
    return list(every()) if every else [comfy.model_management.get_torch_device()]


@needs("devices")
def device_type() -> str:
    """The type of the device the host runs models on: "cuda", "npu", "cpu", ..."""
    import comfy.model_management

    return str(comfy.model_management.get_torch_device().type)


@needs("devices")
def is_cpu() -> bool:
    """Whether the host runs models on the CPU."""
    import comfy.model_management

    return bool(comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device()))


@needs("memory")
def device_memory() -> int:
    """The bytes that the host's device has; the machine's where it computes in that."""
    import comfy.model_management

    return int(comfy.model_management.get_total_memory(comfy.model_management.get_torch_device()))


def has_matmul(kind: str) -> bool:
    """Whether the host multiplies "FP8" (NVIDIA SM 8.9+), "NVFP4", "MXFP8" (SM 10.0+) or "INT8" natively on its device.

    Newer hosts have INT8 off on some devices (MPS, XPU, DirectML) and dequantize it at every call; older ones have no
    such switch and multiply it anywhere.
    """
    import comfy.model_management as management

    supports = getattr(management, f"supports_{kind.lower()}_compute", None)
    if supports is None:
        lacking("matmuls")  # says so where it is not INT8, which older hosts have no switch for
        return kind == "INT8"
    return bool(supports(management.get_torch_device()))


@needs("devices")
def capability() -> tuple[int, int] | None:
    """The CUDA compute capability of the host's device, or None."""
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


@needs("devices")
def amd_architecture() -> str:
    """The architecture of an AMD GPU that the host runs models on ("gfx1100"); empty for any other device."""
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    if device.type != "cuda" or not torch.version.hip:
        return ""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]


@needs("memory estimates")
def float_bytes(count: int, stored: str) -> int:
    """Bytes an element in which the host keeps this many unquantized weights; `stored` as safetensors calls it."""
    import comfy.model_management
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    return int(comfy.model_management.unet_dtype(model_params=count, weight_dtype=dtypes.get(stored)).itemsize)


def torch_builds() -> dict[str, str]:
    """What torch was built for: CUDA's and HIP's versions, empty where it was not."""
    import torch

    return {"CUDA": torch.version.cuda or "", "HIP": torch.version.hip or ""}


def kitchen_backends() -> dict[str, str]:
    """comfy-kitchen's back ends, as the host has set them up: "available" with how many functions, or why not."""
    import comfy.quant_ops  # noqa: F401  # switches back ends on and off
    from comfy_kitchen import list_backends

    def words(state: dict[str, object]) -> str:
        if state.get("disabled"):
            return Text("switched off by ComfyUI")
        if not state.get("available"):
            return str(state.get("unavailable_reason") or Text("not available"))
        capabilities = state.get("capabilities")
        return Text("available, {count} functions", count=len(capabilities) if isinstance(capabilities, list) else 0)

    return {name: words(state) for name, state in list_backends().items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which the host answers itself: it makes room and tries again."""
    import comfy.model_management
    import torch

    is_oom = getattr(comfy.model_management, "is_oom", None)
    return bool(is_oom(error)) if is_oom else isinstance(error, torch.OutOfMemoryError)


@needs("devices")
def synchronize() -> None:
    """Wait until the device the host runs models on has done what it was given; nothing to wait for on a CPU. (The
    host's own `synchronize` waits for CUDA and XPU alone, not for an NPU or MPS.)"""
    import torch

    wait = getattr(getattr(torch, device_type(), None), "synchronize", None)
    if wait is not None and not is_cpu():
        wait()


def allocated_memory(peak: bool = False, device: torch.device | None = None) -> int:
    """Bytes that torch has allocated on a device (None: the host's), or the most since `forget_peak`; 0 where torch
    does not count both (a CPU, MPS, DirectML)."""
    device = device or compute_device()
    counter = _counter(device)
    return int(counter.max_memory_allocated(device) if peak else counter.memory_allocated(device)) if counter else 0


def forget_peak(device: torch.device | None = None) -> None:
    """Let the peak of `allocated_memory` begin anew."""
    device = device or compute_device()
    counter = _counter(device)
    if counter:
        counter.reset_peak_memory_stats(device)


def _counter(device: torch.device) -> Any:
    """torch's module for a device, where that counts memory and its peak; else None."""
    import torch

    module = getattr(torch, device.type, None)
    return module if hasattr(module, "max_memory_allocated") else None


@needs("keeping decoded weights")
def spare_memory(device: torch.device, activations: int = 0) -> int:
    """Bytes of a device's memory that nobody needs at present: what is free, less what the host keeps free for itself
    and others and a step's `activations`; negative where that is short. Where it is the whole machine's: less a quarter
    of all of it."""
    import comfy.model_management as management

    free = management.get_free_memory(device)
    if device.type in ("cpu", "mps"):
        return int(free - management.get_total_memory(device) // 4)
    reserve = max(management.minimum_inference_memory(), management.extra_reserved_memory() + activations)
    return int(free - reserve)


@needs("keeping decoded weights")
def empty_cache() -> None:
    """Give back what torch has allocated and nobody uses."""
    import comfy.model_management

    comfy.model_management.soft_empty_cache()


def free_memory(device: torch.device, patcher: Any) -> int:
    """Bytes that the host can give to a computation of a model on a device now, with the weights that it can evict."""
    return int(patcher.get_free_memory(device))


def progress(total: int) -> Callable[..., None]:
    """A function to call with how far it went (1 by default): moves the node's progress bar and honours Cancel.

    It does nothing outside of ComfyUI.
    """
    if "comfy" not in sys.modules or lacking("progress"):
        return lambda amount=1: None
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def step(amount: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total:
            bar.update(amount)

    return step

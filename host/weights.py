"""What quant/linear.py and quant/lora.py need to fetch and patch weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .check import needs

if TYPE_CHECKING:
    import torch


@needs("LoRA beside SVDQuant")
def calculate_weight(patches: list[tuple], weight: torch.Tensor, key: str) -> torch.Tensor:
    """A weight with the host's patches applied, in place where the host does so."""
    import comfy.lora

    return comfy.lora.calculate_weight(patches, weight, key)


@needs("LoRA beside SVDQuant")
def call_on_load(patcher: Any, key: str, callback: Callable[..., None]) -> None:
    """Call back (patcher, device, ...) whenever this patcher or a clone of it has loaded its model."""
    from comfy.patcher_extension import CallbacksMP

    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, key)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, key, callback)


@needs("LoRA beside SVDQuant")
def is_patching(code: Any) -> bool:
    """Whether a caller (its code object) is the host writing patches into a weight."""
    from comfy.model_patcher import ModelPatcher

    return code is ModelPatcher.patch_weight_to_device.__code__


@needs("quantized layers")
def fetch_weight(module: Any, x: torch.Tensor,
                 requantize: bool = True) -> tuple[Any, Any, Callable[[Any, Any], None]]:
    """Weight (quantized as it is; a patched one quantized again if `requantize`) and bias (in x's dtype) of a module on
    x's device, and what to call after use."""
    import comfy.model_management
    import comfy.ops

    if hasattr(module, "_v") and comfy.model_management.is_device_cpu(x.device):
        # Dynamic VRAM has no CPU side: the host would hand out a dequantized copy.
        bias = None if module.bias is None else module.bias.to(x.device, x.dtype)
        return module.weight.to(x.device), bias, lambda weight, bias: None
    weight, bias, stream = comfy.ops.cast_bias_weight(module, dtype=module.weight.dtype, device=x.device,
                                                      bias_dtype=x.dtype, offloadable=True, compute_dtype=x.dtype,
                                                      want_requant=requantize)
    return weight, bias, lambda weight, bias: comfy.ops.uncast_bias_weight(module, weight, bias, stream)

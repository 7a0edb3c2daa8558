"""What quant/linear.py and quant/patches need to fetch and patch weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .check import needs

if TYPE_CHECKING:
    import torch


class Patching(NamedTuple):
    """The host is putting patches into a weight, for a load or a save, or for hooks. `patches` are None where it only
    moves the weight; `device` is where it is to be (None: where it is)."""

    patches: list[tuple] | None
    device: Any = None
    hook: bool = False


@needs("LoRA beside the weight")
def calculate_weight(patches: list[tuple], weight: torch.Tensor, key: str,
                     original_weights: dict[str, list] | None = None) -> torch.Tensor:
    """A weight with the host's patches applied, in place where the host does so. `original_weights` (key -> [(weight,
    ...)]) are those that hooks made of another model are differences to."""
    import comfy.lora

    return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=weight.dtype,
                                       original_weights=original_weights)


@needs("LoRA beside the weight")
def call_back(patcher: Any, key: str, loaded: Callable[..., None], hooked: Callable[..., None] | None = None) -> None:
    """Call `loaded` (patcher, device, ...) whenever this patcher or a clone of it has loaded its model, and `hooked`
    (patcher, hooks) when it has put other hooks into the weights."""
    from comfy.patcher_extension import CallbacksMP

    for kind, callback in ((CallbacksMP.ON_LOAD, loaded), (CallbacksMP.ON_APPLY_HOOKS, hooked)):
        patcher.remove_callbacks_with_key(kind, key)
        if callback is not None:
            patcher.add_callback_with_key(kind, key, callback)


@needs("LoRA beside the weight")
def is_loaded(patcher: Any) -> bool:
    """Whether the host has loaded this model: a text encoder that runs where it is kept is from the beginning."""
    return bool(patcher.loaded_size())


@needs("LoRA beside the weight")
def patching(frame: Any) -> Patching | None:
    """What the host does where a Linear is asked for its weight from this frame, or None if it is somebody else.

    Hooks are answered for by `hook_patches`: the host is left with none to evaluate.
    """
    from comfy.model_patcher import ModelPatcher

    if frame.f_code is ModelPatcher.patch_weight_to_device.__code__:
        names = frame.f_locals
        return Patching(names["self"].patches.get(names["key"]), names["device_to"])
    if frame.f_code is ModelPatcher.patch_hook_weight_to_device.__code__:
        names = frame.f_locals
        names["combined_patches"][names["key"]] = []  # made for this call alone
        return Patching(None, hook=True)
    return None


@needs("LoRA beside the weight")
def add_loaded(patcher: Any, size: int) -> None:
    """Tell the host of bytes that have come with patches into what it has just loaded: it gives them back with the
    rest."""
    if size and not patcher.is_dynamic():
        patcher.model.model_loaded_weight_memory += size


@needs("LoRA beside the weight")
def patch_set(patcher: Any) -> Any:
    """What is another where a patcher has other patches."""
    return patcher.patches_uuid


@needs("LoRA beside the weight")
def hook_patches(patcher: Any, hooks: Any) -> dict[str, list[tuple]]:
    """Weight -> what these hooks change at their present strength."""
    return patcher.get_combined_hook_patches(hooks)


@needs("LoRA beside the weight")
def are_hooked(patcher: Any, hooks: Any) -> bool:
    """Whether these very hooks are in a patcher's weights at present."""
    return hooks is not None and patcher.current_hooks is hooks


@needs("LoRA beside the weight")
def forget_hook_backup(patcher: Any, key: str, instead: torch.Tensor) -> None:
    """Let go of the copy of a weight that the host keeps while hooks are in it, where none are."""
    if key in patcher.hook_backup:
        patcher.hook_backup[key] = (instead, patcher.hook_backup[key][1])


@needs("LoRA beside the weight")
def forget_forced_casts(patcher: Any) -> None:
    """Where a MODEL has a compute dtype of its own, the host marks fully loaded modules as those that it keeps out of
    VRAM, never takes that back, and so leaves the patches of them away when VRAM gets short (ComfyUI 0.30 to 0.33,
    ModelPatcher.load: "Already lowvramed")."""
    for module in patcher.model.modules():
        if getattr(module, "comfy_patched_weights", False) is True and hasattr(module, "prev_comfy_cast_weights"):
            del module.prev_comfy_cast_weights


@needs("quantized layers")
def fetch_weight(module: Any, x: torch.Tensor) -> tuple[Any, Any, Callable[[Any, Any], None]]:
    """Weight (quantized as it is) and bias (in x's dtype) of a module without patches on x's device, and what to call
    after use."""
    weight, bias, device = module.weight, module.bias, x.device
    if weight.device == device and (bias is None or bias.device == device) and not (
            module.weight_function or module.bias_function or "_v" in module.__dict__):
        # Nothing is to be moved, which the host takes 15 us to find out.
        return weight, None if bias is None else bias.to(x.dtype), _nothing
    import comfy.model_management
    import comfy.ops

    if hasattr(module, "_v") and comfy.model_management.is_device_cpu(x.device):
        # Dynamic VRAM has no CPU side: the host would hand out a dequantized copy.
        return weight.to(device), None if bias is None else bias.to(device, x.dtype), _nothing
    weight, bias, stream = comfy.ops.cast_bias_weight(module, dtype=weight.dtype, device=device, bias_dtype=x.dtype,
                                                      offloadable=True, compute_dtype=x.dtype, want_requant=True)
    return weight, bias, lambda weight, bias: comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _nothing(weight: Any, bias: Any) -> None:
    """What there is to do after the use of a weight that was not moved."""


def before_layer() -> None:
    """What the host does before each of its quantized layers: it honours Cancel."""
    import comfy.ops

    every = getattr(comfy.ops, "run_every_op", None)
    if every is not None:
        every()

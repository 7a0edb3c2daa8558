"""Dynamic VRAM outside of the host's server: what its main.py starts, so that other runs hold memory as it does."""

from __future__ import annotations

from .check import lacking


def start_dynamic_vram() -> bool:
    """Let comfy-aimdo manage the GPU's memory where the host's server would; whether it does. False where it does not
    work, as there: models are then loaded by estimates. Call it before anything is on the GPU."""
    if lacking("dynamic VRAM"):
        return False
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    if not comfy.cli_args.args.enable_dynamic_vram and not (
            comfy.cli_args.enables_dynamic_vram() and comfy.model_management.is_nvidia()
            and not comfy.model_management.is_wsl()):
        return False
    try:
        comfy_aimdo.control.init(nvml_pressure=True)
    except TypeError:  # comfy-aimdo 0.4.10
        comfy_aimdo.control.init()
    if not comfy_aimdo.control.init_devices(device.index for device in comfy.model_management.get_all_torch_devices()):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True

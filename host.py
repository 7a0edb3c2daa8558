"""The one seam to ComfyUI: everything this pack uses of the host comes through here, public entry points only.

Imports happen inside the functions, so that headers can be read and described without torch or ComfyUI.
Where hosts differ, ask for the capability, not the version.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OWN_FOLDER_KEY = "diffusers_components"
MODEL_FOLDER_KEYS = (OWN_FOLDER_KEY, "diffusers", "diffusion_models")
ATTACHMENT = "quantized_transformers"


def version() -> str:
    """ComfyUI's version, or "not found" outside of it."""
    try:
        import comfyui_version
        return comfyui_version.__version__
    except ImportError:
        return "not found"


def ready() -> None:
    """Import the host's loader ahead of use, so that what follows can be timed."""
    import comfy.sd  # noqa: F401


def register_model_folder() -> None:
    """Add models/diffusers_components to ComfyUI's folders, beside what extra_model_paths.yaml says of that key."""
    import folder_paths

    folder_paths.add_model_folder_path(OWN_FOLDER_KEY, os.path.join(folder_paths.models_dir, OWN_FOLDER_KEY))


def model_folders() -> list[str]:
    """The folders ComfyUI keeps models in (extra_model_paths.yaml included); empty outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    folders: list[str] = []
    for key in MODEL_FOLDER_KEYS:
        paths = folder_paths.folder_names_and_paths.get(key, ([], set()))[0]
        folders += [path for path in paths if path not in folders]
    return folders


def cached_snapshot(repo: str, revision: str = "") -> str | None:
    """The folder of a repo that is in the Hugging Face cache, complete or not, or None. Never opens a connection."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(repo, revision=revision or None, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:  # no huggingface_hub, not cached, an invalid id: "not here",
        return getattr(error, "snapshot_path", None)  # or some files of the repo are (IncompleteSnapshotError)


def load_file(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped the way this host streams them."""
    import comfy.utils

    return comfy.utils.load_torch_file(path)


def load_state_dict(tensors: dict[str, torch.Tensor], *, options: dict[str, Any] | None = None,
                    disable_dynamic: bool = False) -> Any:
    """Native tensors → the host's ModelPatcher, or None when the host does not know the architecture."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options or {},
                                                    disable_dynamic=disable_dynamic)


def mixed_operations(tensors: dict[str, torch.Tensor], native: bool = False) -> Any:
    """The mixed-precision operations that the host would pick for these native tensors on its device.

    `native=True` keeps the quantized matmuls even where the host would emulate them.
    """
    import comfy.model_detection
    import comfy.model_management
    import comfy.ops

    config = comfy.model_detection.model_config_from_unet(tensors, "")
    device = comfy.model_management.get_torch_device()
    compute = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    if native:
        return comfy.ops.mixed_precision_ops({"mixed_ops": True}, compute)
    return comfy.ops.pick_operations(None, compute, load_device=device,
                                     model_config=SimpleNamespace(quant_config={"mixed_ops": True}))


def native_names(model: Any, names: list[str]) -> set[str]:
    """The names that the host's architecture gives these native tensor names (it renames a few while loading)."""
    return set(model.model_config.process_unet_state_dict(dict.fromkeys(names)))


def device_name() -> str:
    """The device the host runs models on, in words."""
    import comfy.model_management

    return comfy.model_management.get_torch_device_name(comfy.model_management.get_torch_device())


def has_matmul(kind: str) -> bool:
    """Whether the host multiplies "FP8" (NVIDIA SM 8.9+) or "NVFP4" (SM 10.0+) natively on its device."""
    import comfy.model_management as management

    supports = {"FP8": management.supports_fp8_compute, "NVFP4": management.supports_nvfp4_compute}[kind]
    return bool(supports(management.get_torch_device()))


def capability() -> tuple[int, int] | None:
    """The CUDA compute capability of the host's device, or None."""
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None


def is_cpu() -> bool:
    """Whether the host runs models on the CPU."""
    import comfy.model_management

    return bool(comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device()))


def progress(total: int) -> Callable[..., None]:
    """A function to call with how far it went (1 by default): moves the node's progress bar and honours Cancel.

    It does nothing outside of ComfyUI.
    """
    if "comfy" not in sys.modules:
        return lambda amount=1: None
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def step(amount: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total:
            bar.update(amount)

    return step


def load_without_memory(tensors: dict[str, torch.Tensor], *, options: dict[str, Any],
                        disable_dynamic: bool = False) -> Any:
    """As load_state_dict, for meta tensors: a model whose weights have shapes and dtypes but no memory."""
    import comfy.model_base
    import torch

    options = {**options, "offload_device": torch.device("cpu")}  # meta tensors cannot move to another
    with torch.device("meta"):
        patcher = load_state_dict(tensors, options=options, disable_dynamic=disable_dynamic)
    if patcher is not None:  # the noise schedule is real: nodes read sigmas from a MODEL before it runs
        model = patcher.model
        model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    return patcher


class _Refusal:
    """A model patch that raises when the host casts it to the model's dtype: the first thing it does to load a model.

    Moves between devices are let through: the host makes those when it lets go of a model, too.
    """

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error

    def to(self, target: Any, *_args: Any, **_kwargs: Any) -> _Refusal:
        import torch

        if isinstance(target, torch.dtype):
            raise self.error()
        return self


def refuse_to_run(patcher: Any, error: Callable[[], Exception]) -> None:
    """Make every use of the model's weights (sampling, saving) raise what `error` returns, before anything is moved."""
    patcher.set_model_patch(_Refusal(error), ATTACHMENT)


def carry_over(patcher: Any, fresh: Any) -> Any:
    """A clone of `patcher` (patches, options, hooks, wrappers) around the model of `fresh`; neither is changed.

    This is how the host itself re-homes a patcher (`deepclone_multigpu`), less what belongs to the old weights.
    """
    clone = patcher.clone(model_override=fresh.get_clone_model_override())
    clone.model_options["transformer_options"].get("patches", {}).pop(ATTACHMENT, None)
    clone.load_device, clone.offload_device = fresh.load_device, fresh.offload_device
    clone.size = 0  # measured again on the new weights
    clone.parent = None  # the parent's weights are others; the host must never fall back to them
    clone.clone_base_uuid = fresh.clone_base_uuid
    clone.hook_backup, clone.cached_hook_patches = {}, {}
    clone.cached_patcher_init = fresh.cached_patcher_init
    clone.attachments[ATTACHMENT] = fresh.attachments[ATTACHMENT]
    clone.object_patches = {**fresh.object_patches, **clone.object_patches}  # what a user set on the base wins
    return clone


def bound_to_weights(patcher: Any) -> str:
    """What on a patcher holds on to its present weights and could not follow to others; empty when nothing does."""
    if "torch_compile_kwargs" in patcher.model_options:
        return "a compiled model (torch.compile)"
    modules = [key for key in patcher.object_patches if key.startswith("diffusion_model.")]
    if modules:
        return f"patched modules ({', '.join(modules[:3])})"
    if patcher.injections:
        return f"injected modules ({', '.join(list(patcher.injections)[:3])})"
    return ""


def environment() -> dict[str, str]:
    """The environment variables that steer this pack, for the doctor."""
    names = ("COMFYUI_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    return {name: os.environ[name] for name in names if name in os.environ}

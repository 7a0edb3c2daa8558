"""The one seam to ComfyUI: everything this pack uses of the host comes through here, public entry points only.

Imports happen inside the functions, so that headers can be read and described without torch or ComfyUI.
Where hosts differ, ask for the capability, not the version. contract.py lists what is leaned on, check.py asks for it.

A module of this folder is imported when a name of it is first asked for: ComfyUI's start needs one (start.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import all_lacks, found_lacks, is_there, lacking, require, starters, version
    from .checkpoints import Parts, load_text_encoders_of, parts_of
    from .devices import (
        all_devices,
        allocated_memory,
        amd_architecture,
        capability,
        compute_device,
        device_memory,
        device_name,
        device_type,
        empty_cache,
        float_bytes,
        forget_peak,
        free_memory,
        has_matmul,
        is_cpu,
        is_out_of_memory,
        kitchen_backends,
        progress,
        spare_memory,
        synchronize,
        torch_builds,
    )
    from .dynamic import start_dynamic_vram
    from .elsewhere import act_for, start_when_needed
    from .errors import CheckpointError, HostChanged
    from .folders import (
        MODEL_FOLDER_KEYS,
        comfyui_path,
        download_folder,
        environment,
        folder_kinds,
        model_file,
        model_folders,
        once,
        output_folder,
        ready,
        text_folders,
    )
    from .loras import BELOW, layer_shapes, load_lora, lora_files, lora_names, lora_pair, lora_path
    from .machines import MATMULS, Machine, machine
    from .measuring import empty_latent, let_go, weight_bytes
    from .memory import without_memory
    from .models import (
        ATTACHMENT,
        PREFERENCE,
        SOURCES,
        bound_to_weights,
        carry_over,
        load_file,
        load_state_dict,
        load_without_memory,
        mixed_operations,
        mixed_operations_in,
        model_identity,
        native_names,
        patched_tensors,
        quantized_formats,
        quantized_weight,
        refuse_to_run,
        takes_attention_preferences,
        tensors_for_saving,
        unpatched_tensors,
    )
    from .passthrough import NO_DIFFUSION, TRIED, Network, config_name, header_of, network, unet_names
    from .running import Waiting
    from .sampling import around_sampling, decode_latents, sample, start_of
    from .server import language_of, other_origins_allowed, output_types, page_speaks
    from .start import OWN_FOLDER_KEY, on_prompt, register_model_folder, routes, sampler_names, scheduler_names
    from .text_encoders import (
        bundled_tokenizer,
        follow_tokenizer_json,
        has_quantized_layers,
        is_instance_of,
        load_text_encoders,
        mt5_handed_on,
        pad_with,
        read_normed,
        take_away,
        tekken_read_by,
        text_encoder_dtype,
        text_encoder_shapes,
        text_operations,
        tokenizer_of,
    )
    from .vaes import diffusers_vae_names, latent_map, load_vae, load_vae_sized, vae_module, vae_tensors
    from .videos import Size, file_of_video, video_of_file, video_of_frames
    from .weights import (
        Patching,
        add_loaded,
        are_hooked,
        before_layer,
        calculate_weight,
        call_back,
        fetch_weight,
        forget_forced_casts,
        forget_hook_backup,
        hook_patches,
        is_loaded,
        patch_set,
        patching,
    )

# The same for whoever runs this: module -> its names. A test holds the two together.
_NAMES = {
    "check": "all_lacks found_lacks is_there lacking require starters version",
    "checkpoints": "Parts load_text_encoders_of parts_of",
    "devices": (
        "all_devices allocated_memory amd_architecture capability compute_device device_memory device_name device_type "
        "empty_cache float_bytes forget_peak free_memory has_matmul is_cpu is_out_of_memory kitchen_backends progress "
        "spare_memory synchronize torch_builds"
    ),
    "dynamic": "start_dynamic_vram",
    "elsewhere": "act_for start_when_needed",
    "errors": "CheckpointError HostChanged",
    "folders": (
        "MODEL_FOLDER_KEYS comfyui_path download_folder environment folder_kinds model_file model_folders "
        "once output_folder ready text_folders"
    ),
    "loras": "BELOW layer_shapes load_lora lora_files lora_names lora_pair lora_path",
    "machines": "MATMULS Machine machine",
    "measuring": "empty_latent let_go weight_bytes",
    "memory": "without_memory",
    "models": (
        "ATTACHMENT PREFERENCE SOURCES bound_to_weights carry_over load_file load_state_dict load_without_memory "
        "mixed_operations mixed_operations_in model_identity native_names patched_tensors quantized_formats "
        "quantized_weight refuse_to_run takes_attention_preferences tensors_for_saving unpatched_tensors"
    ),
    "passthrough": "NO_DIFFUSION TRIED Network config_name header_of network unet_names",
    "running": "Waiting",
    "sampling": "around_sampling decode_latents sample start_of",
    "server": "language_of other_origins_allowed output_types page_speaks",
    "start": "OWN_FOLDER_KEY on_prompt register_model_folder routes sampler_names scheduler_names",
    "text_encoders": (
        "bundled_tokenizer follow_tokenizer_json has_quantized_layers is_instance_of load_text_encoders mt5_handed_on "
        "pad_with read_normed take_away tekken_read_by text_encoder_dtype text_encoder_shapes text_operations "
        "tokenizer_of"
    ),
    "vaes": "diffusers_vae_names latent_map load_vae load_vae_sized vae_module vae_tensors",
    "videos": "Size file_of_video video_of_file video_of_frames",
    "weights": (
        "Patching add_loaded are_hooked before_layer calculate_weight call_back fetch_weight forget_forced_casts "
        "forget_hook_backup hook_patches is_loaded patch_set patching"
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    for one in _NAMES[_HOMES[name]].split():
        globals().setdefault(one, getattr(module, one))  # elsewhere.act_for may have answered before
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

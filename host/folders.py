"""Where the host keeps models."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TypeVar

from .check import lacking, needs
from .start import OWN_FOLDER_KEY

MODEL_FOLDER_KEYS = (OWN_FOLDER_KEY, "diffusers", "diffusion_models", "checkpoints", "vae")
TEXT_FOLDER_KEYS = ("text_encoders",)
T = TypeVar("T")


def ready() -> None:
    """Import the host's loader ahead of use, so that what follows can be timed."""
    import comfy.sd  # noqa: F401


def comfyui_path() -> str:
    """The folder of this ComfyUI; empty outside of it."""
    try:
        import folder_paths
    except ImportError:
        return ""
    return os.path.dirname(inspect.getfile(folder_paths))


def text_folders() -> list[str]:
    """The folders ComfyUI keeps text encoders in; see model_folders."""
    return model_folders(TEXT_FOLDER_KEYS)


def model_folders(keys: tuple[str, ...] = MODEL_FOLDER_KEYS) -> list[str]:
    """The folders ComfyUI keeps models in (extra_model_paths.yaml included); empty outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    known = getattr(folder_paths, "folder_names_and_paths", None)
    if known is None:
        lacking("folders")  # which says so
        return []
    folders: list[str] = []
    for key in keys:
        paths = known.get(key, ([], set()))[0]
        folders += [path for path in paths if path not in folders]
    return folders


def download_folder(key: str) -> str:
    """Where new models of a kind go: the default of extra_model_paths.yaml, else ComfyUI's own folder of that name."""
    folders = model_folders((key,))
    return next((path for path in folders if os.path.basename(path) != "unet"), folders[0])  # "unet" is its old name


def model_file(kind: str, name: str) -> str:
    """The path of a name in the host's lists of a kind ("loras"), as its own loaders look it up; empty when it is not
    there, and outside of it."""
    try:
        import folder_paths
    except ImportError:
        return ""
    return str(folder_paths.get_full_path(kind, name) or "")


def folder_kinds() -> dict[str, list[str]]:
    """Each of model_folders and text_folders -> what ComfyUI calls it ("checkpoints"); several names may have one."""
    kinds: dict[str, list[str]] = {}
    for key in (*MODEL_FOLDER_KEYS, *TEXT_FOLDER_KEYS):
        for folder in model_folders((key,)):
            kinds.setdefault(folder, []).append(key)
    return kinds


def once(name: str, make: Callable[[], T]) -> T:
    """What `make` returns; made once for all nodes while ComfyUI lists them (/object_info), as it does with its own
    lists of files."""
    try:
        from folder_paths import cache_helper
    except ImportError:  # outside ComfyUI, or in one that has no such thing
        return make()
    kept = cache_helper.get(name)
    if kept is None:
        kept = make()
        cache_helper.set(name, kept)
    return kept


@needs("output folder")
def output_folder() -> str:
    """The folder that ComfyUI's save nodes write to."""
    import folder_paths

    return str(folder_paths.get_output_directory())


def environment() -> dict[str, str]:
    """The environment variables that steer this pack, for the doctor."""
    names = ("COMFYUI_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET",
             "MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_PREFER_AI_SITE", "QT_HUB",
             "QT_LANG")
    return {name: os.environ[name] for name in names if name in os.environ}

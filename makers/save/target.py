"""Where a saved file may go: ComfyUI's output folder and its model folders, as its own save nodes have it."""

from __future__ import annotations

import os
from pathlib import Path

from ... import host
from ...host.texts import Text
from ...loaders.errors import CheckpointError

SUFFIX = ".safetensors"


def target_file(filename: str) -> Path:
    """The file that `filename` names; ".safetensors" is added where it is missing. Nothing is changed on disk.

    A relative path is below ComfyUI's output folder, where `diffusion_models/` is one of the loaders' folders. An
    absolute one must lie in the output folder or a model folder, links followed. Raises CheckpointError for others.
    """
    text = filename.strip()
    path = Path(text).expanduser()
    if not text or "\0" in text or ".." in path.parts or text.endswith(("/", os.sep)):
        raise CheckpointError(Text("no file name is given") if not text else Text("this is no name of a file"), text,
                              Text("give a name such as diffusion_models/my-model"))
    if path.suffix.lower() != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    output = host.output_folder()
    roots = [Path(os.path.realpath(folder)) for folder in (output, *host.model_folders())]
    target = Path(os.path.realpath((output / path).parent)) / path.name  # an absolute path stays itself
    if not any(target.parent.is_relative_to(root) for root in roots):
        raise CheckpointError(Text("this is outside of ComfyUI's output and model folders"), target,
                              Text("give a name relative to {output}, or a path in a model folder", output=output))
    if path.name.startswith("."):
        raise CheckpointError(Text("a hidden file is not found by ComfyUI"), target, Text("give another name"))
    return target


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError when `target` is a folder, or exists and is not to be overwritten."""
    if target.is_dir():
        raise CheckpointError(Text("this is a folder"), target, Text("give the name of a file"))
    if os.path.lexists(target) and not overwrite:
        raise CheckpointError(Text("this file exists"), target, Text("give another name, or switch overwrite on"))

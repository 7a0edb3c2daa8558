"""Load LoRA for Transformer."""

from __future__ import annotations

import hashlib
import os

from comfy_api.latest import io

from .. import host
from ..host.texts import Text, said
from ..loaders.errors import CheckpointError
from . import inputs


def _file(lora: str | None, path: str | None) -> str:
    """The path of what a node loads. Raises CheckpointError where it is not there."""
    name = inputs.chosen(path, lora)
    found = os.path.expanduser(name)
    if not os.path.isabs(found):  # a name in ComfyUI's folders
        found = host.lora_path(name) or found
    if not name or not os.path.isfile(found):
        raise CheckpointError(Text("this LoRA is not there"), name,
                              Text("choose a file of ComfyUI's folder loras, or give a path"))
    if not found.endswith(".safetensors"):
        raise CheckpointError(Text("this is no .safetensors file"), name,
                              Text("choose a LoRA in safetensors; others may hold code"))
    return found


class QT_LoadLoRA(io.ComfyNode):
    """A MODEL with a LoRA, in ComfyUI's names or in diffusers'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [name for name in host.lora_files() if name.endswith(".safetensors")]
        return io.Schema(
            node_id="QT_LoadLoRA", display_name="Load LoRA for Transformer", category=inputs.CATEGORY,
            description="Loads a LoRA on any transformer, also one in diffusers' names where ComfyUI's own node leaves "
                        "them away (Wan, HunyuanVideo, LTX-Video, Lumina 2, Cosmos, Mochi ...), at the scale that "
                        "diffusers saved with it. Says what it has no layer for, and refuses one for another model.",
            search_aliases=["lora", "diffusers lora", "peft", "lora loader", "wan lora", "hunyuanvideo lora"],
            inputs=[
                io.Model.Input("model", tooltip="From any loader, quantized or not."),
                io.Combo.Input("lora", optional=True, options=files, tooltip="A file of ComfyUI's folder loras."),
                io.Float.Input("strength", optional=True, default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="How much of it; may be negative. 0: the MODEL as it is."),
                io.String.Input("path", optional=True, default="",
                                tooltip="The path of a .safetensors file, or its name in the folder loras. When it is "
                                        "not empty it wins over the list."),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, lora: str | None = None, path: str | None = "") -> bool | str:
        if path is None or lora is None and not inputs.chosen(path, ""):  # by a link
            return True
        try:
            _file(lora, path)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", path: str = "", strength: float = 1.0, model=None) -> str:
        file = _file(lora, path)
        state = os.stat(file)
        return hashlib.sha256(f"{file}\0{state.st_mtime_ns}\0{state.st_size}\0{strength}".encode()).hexdigest()

    @classmethod
    def execute(cls, model, lora: str = "", strength: float = 1.0, path: str = "") -> io.NodeOutput:
        from ..loaders import loras

        patched, report = loras.apply(model, _file(lora, path), strength)
        return io.NodeOutput(patched, said(report))

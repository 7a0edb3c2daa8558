"""Nodes that name files: their widgets as the page stores them, in order, as far as the last that is read here, and
what they name. Checked against the real nodes by tests/commands/test_workflow.py.

Kept here because a worker that is looked at has not started: nodes and lists are ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ...loaders.components import overrides
from ...loaders.queries import Query

SERVER, LORA = "QT_ServerModel", "QT_LoadLoRA"
# Nodes that take a free reference, which wins over the list that is named first.
QUERIED: dict[str, tuple[str, ...]] = {
    "QT_LoadBaseModel": ("base_model", "component", "weights", "reference", "dtype", "revision"),
    "QT_LoadBaseTextEncoder": ("base_model", "reference", "dtype", "revision", "download_missing", *overrides.INPUTS),
    "QT_LoadBaseVAE": ("base_model", "reference", "dtype", "revision"),
    "QT_ApplyTransformerOverride": ("override", "kind", "reference", "weights_name", "compute", "fp4_backend",
                                    "revision"),
    "QT_NunchakuSVDQLoader": ("weights", "precision", "rank", "reference", "weights_name", "backend", "revision"),
    "QT_ModelSlimLoader": ("folder", "component", "reference", "compute", "revision"),
    "QT_InspectCheckpoint": ("checkpoint", "reference", "weights_name"),
}
# Inputs of the nodes that make files which are references; they take what is on this machine only.
READ: dict[str, tuple[str, ...]] = {
    "QT_BuildFP8Transformer": ("modelopt_export", "base"), "QT_BuildNVFP4Transformer": ("modelopt_export", "base"),
    "QT_BuildGGUF": ("base",), "QT_RepackModelSlimWan": ("source", "base"),
}
_OTHERS: dict[str, tuple[str, ...]] = {
    "QT_BuildFP8Transformer": ("modelopt_export", "backbone", "base"),
    "QT_BuildNVFP4Transformer": ("modelopt_export", "base"),
    "QT_BuildGGUF": ("base",), "QT_RepackModelSlimWan": ("source", "base"),
    LORA: ("lora", "strength", "path"),
    SERVER: ("base_model", "override", "kind", "server", "reference", "override_reference", "weights_name",
             "transformer_2", "revision"),
}


class Stock(NamedTuple):
    """A loader of ComfyUI's: its widgets, which of them name a file of which of ComfyUI's folders, and whether what it
    loads is a model, whose change costs a worker its time, or something put on one."""

    widgets: tuple[str, ...]
    files: Mapping[str, str]
    model: bool = True


def _clips(count: int, *more: str) -> Stock:
    names = tuple(f"clip_name{number}" for number in range(1, count + 1))
    return Stock((*names, *more), dict.fromkeys(names, "text_encoders"))


_CKPT = Stock(("ckpt_name",), {"ckpt_name": "checkpoints"})
STOCK: dict[str, Stock] = {
    "UNETLoader": Stock(("unet_name",), {"unet_name": "diffusion_models"}),
    "CheckpointLoaderSimple": _CKPT, "ImageOnlyCheckpointLoader": _CKPT, "unCLIPCheckpointLoader": _CKPT,
    "LTXVAudioVAELoader": _CKPT,
    "CheckpointLoader": Stock(("config_name", "ckpt_name"), {"ckpt_name": "checkpoints"}),
    "CLIPLoader": Stock(("clip_name",), {"clip_name": "text_encoders"}),
    "DualCLIPLoader": _clips(2), "TripleCLIPLoader": _clips(3), "QuadrupleCLIPLoader": _clips(4),
    "LTXAVTextEncoderLoader": Stock(("text_encoder", "ckpt_name"),
                                    {"text_encoder": "text_encoders", "ckpt_name": "checkpoints"}),
    "VAELoader": Stock(("vae_name",), {"vae_name": "vae"}),
    "LoraLoader": Stock(("lora_name",), {"lora_name": "loras"}, model=False),
    "LoraLoaderModelOnly": Stock(("lora_name",), {"lora_name": "loras"}, model=False),
    "ControlNetLoader": Stock(("control_net_name",), {"control_net_name": "controlnet"}, model=False),
    "CLIPVisionLoader": Stock(("clip_name",), {"clip_name": "clip_vision"}, model=False),
    "StyleModelLoader": Stock(("style_model_name",), {"style_model_name": "style_models"}, model=False),
    "UpscaleModelLoader": Stock(("model_name",), {"model_name": "upscale_models"}, model=False),
    "ModelPatchLoader": Stock(("name",), {"name": "model_patches"}, model=False),
}
WIDGETS: dict[str, tuple[str, ...]] = QUERIED | _OTHERS | {name: stock.widgets for name, stock in STOCK.items()}


def referring() -> dict[str, dict[str, Any]]:
    """What nodes.checks.referring says, of the nodes in QUERIED: the list, and the inputs that choose among files."""
    asked = {field.name for field in fields(Query)} - {"reference"}
    return {name: {"input": widgets[0], "others": [one for one in widgets[1:] if one in asked]}
            for name, widgets in QUERIED.items()}


def outputs(kind: str) -> tuple[str, ...]:
    """The types of a node's outputs as far as the way of a MODEL asks: those of loaders that give none, else any."""
    if kind in ("QT_LoadBaseTextEncoder", "QT_LoadBaseVAE", "VAELoader") or "CLIPLoader" in kind:
        return ()
    return ("*",) * 16

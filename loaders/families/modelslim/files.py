"""Which files of a folder are a ModelSlim checkpoint.

The writers' names (docs/sources/ascend.md, "File names"): quant_model_description.json (AscendV1) or
quant_model_description_<type>.json (MindIE), and quant_model_weight(s)*.safetensors with an index when sharded. A repo
that was repacked for diffusers has the description beside diffusion_pytorch_model*.safetensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from ....host.texts import Text
from ...errors import CheckpointError, MissingFiles
from ...files.scan import Root, of_roots
from ...files.selection import PIPELINE, Folder, Selection, select_component
from ...words import first_ten

EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}  # of Wan2.2 A14B
KNOWN = ("Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8",)
_DESCRIPTION = r"quant_model_description(_[^/]+)?\.json"
_WEIGHTS = r"quant_model_weights?([^/]*)\.safetensors(\.index\.json)?"


def is_description(path: str) -> bool:
    """Whether a file is called as msmodelslim calls its description."""
    return "quant_model_description" in path and re.fullmatch(
        _DESCRIPTION, PurePosixPath(path.replace("\\", "/")).name) is not None  # not even compiled while ComfyUI starts


def is_weights(path: str) -> bool:
    """Whether a file is called as msmodelslim calls its weights."""
    return re.fullmatch(_WEIGHTS, PurePosixPath(path.replace("\\", "/")).name) is not None


def has_description(path: Path) -> bool:
    """Whether a weight file belongs to a description: by its name, or as the only one in a folder with one."""
    if is_weights(path.name):
        return True
    names = os.listdir(path.parent)
    return any(map(is_description, names)) and sum(name.endswith(".safetensors") for name in names) == 1


def select(folder: Folder, component: str, weights_name: str = "") -> Selection | None:
    """The files of one transformer of a ModelSlim folder; None for a folder that is none.

    `folder` is an export with two experts, one expert or a single export, a repacked pipeline or its transformer. The
    description, and the vendor's own config.json, are in the selection's `texts`. Raises MissingFiles for an expert
    or a description that is not there, CheckpointError when the choice is ambiguous.
    """
    name = _subfolder(folder, component)
    inside = [file for file in folder.names(name) if "/" not in file] if name is not None else []
    descriptions = sorted(filter(is_description, inside))
    where = f"{folder.place}/{name}" if name else folder.place
    if not descriptions:
        if any(map(is_weights, inside)):
            raise MissingFiles(Text("there are ModelSlim weights but no quant_model_description*.json, without which "
                                    "the numbers in them mean nothing"), where,
                               Text("copy it from the export, or finish the download"))
        return None
    assert name is not None
    chosen = select_component(folder, name, weights_name)
    first = PurePosixPath(chosen.index_file or chosen.files[0]).name
    texts = [_description_of(first, descriptions, where)]
    config = chosen.config
    if config and folder.read_json(config).get("_class_name") == "WanModel":  # the vendor's keys, not diffusers'
        texts.append("config.json")
        config = None
    return chosen._replace(config=config, texts=tuple(f"{name}/{text}" if name else text for text in texts))


def _subfolder(folder: Folder, component: str) -> str | None:
    """Where in the folder the component is; None when nothing in it looks like ModelSlim's."""
    inside = folder.names()
    ours = {file.rpartition("/")[0] for file in inside if is_description(file) or is_weights(file)}
    if not ours:
        return None
    if ours & set(EXPERTS.values()):
        if EXPERTS[component] not in ours:
            raise MissingFiles(Text("this export has no {folder} ({component})", folder=EXPERTS[component],
                                    component=component), folder.place,
                               Text("it has {folders}; give that folder, or complete the export",
                                    folders=first_ten(sorted(ours))))
        return EXPERTS[component]
    if PIPELINE in inside or component in ours:
        return component
    if "" in ours:
        if component != "transformer":
            raise CheckpointError(Text("this is a single model, it has no {component}", component=component),
                                  folder.place,
                                  Text("set component to transformer, or give the folder above both experts"))
        return ""
    return None


def _description_of(weights: str, descriptions: list[str], where: str) -> str:
    """The description that belongs to a weight file or index: of the same type, else the unnamed one, else the only."""
    named = re.fullmatch(_WEIGHTS, weights)
    wanted = f"quant_model_description{named[1]}.json" if named else ""
    for name in (wanted, "quant_model_description.json"):
        if name in descriptions:
            return name
    if len(descriptions) > 1:
        raise CheckpointError(Text("there are {count} descriptions, and none is called as {weights}: {names}",
                                   count=len(descriptions), weights=weights, names=first_ten(descriptions)), where,
                              Text("keep the one that belongs to the weights"))
    return descriptions[0]


def local_folders() -> list[str]:
    """ModelSlim folders in ComfyUI's model folders, relative to these; the parent of two experts, and the pipeline of a
    repacked export, stand for what is in them."""
    return of_roots(_local_folders)


def _local_folders(roots: tuple[Root, ...]) -> list[str]:
    found: set[str] = set()
    for root in roots:
        for path, folder in root.folders.items():
            if any(map(is_description, folder.files)):
                above, _, name = path.rpartition("/")
                whole = name in EXPERTS.values() or name in EXPERTS and PIPELINE in root.folders[above].files
                found.add(above if whole and above else path)
    return sorted(found - {""})

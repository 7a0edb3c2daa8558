"""References of a server on this machine: whole pipelines, what replaces their transformers, and LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...host.texts import Text
from ...loaders.components.pipeline import Pipeline, locate_parts
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.describe import describe, describe_config
from ...loaders.description import CheckpointDescription
from ...loaders.errors import CheckpointError
from ...loaders.files.places import LocalFolder, candidates, resolve
from ...loaders.files.selection import INDEX, PIPELINE, WEIGHTS, Folder, Selection, select_component
from ...loaders.files.source import Source
from ...loaders.locate import locate
from .identity import ROLES, Part, part_of

NVFP4 = ("modelopt-nvfp4", "nvfp4")
MIXED = "-mixed.safetensors"
KINDS = ("auto", "component", "weights")


class Base(NamedTuple):
    """A pipeline on this machine: `listed` is its model_index.json, `pipeline_class` the class in it."""

    part: Part
    folder: str
    listed: dict[str, Any]

    @property
    def pipeline_class(self) -> str:
        return str(self.listed.get("_class_name", ""))


class Override(NamedTuple):
    """What replaces a transformer: `path` as SGLang takes it, a folder with config.json ("component"), or a weight file
    or folder ("weights")."""

    part: Part
    kind: str
    path: str
    description: CheckpointDescription


class LoRA(NamedTuple):
    """A LoRA on this machine, and its strength."""

    part: Part
    path: str
    strength: float


def base_of(reference: str, revision: str = "", download: bool = False) -> Base:
    """All of a pipeline but what it can be without. Raises CheckpointError where it is not whole, or no pipeline."""

    def wanted(index: dict[str, Any]) -> Sequence[str]:
        return [
            name
            for name, kind in index.items()
            if isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)
        ]

    found = locate_parts(reference, wanted, revision=revision, download=download, patterns=("*/*",))
    return Base(part_of(found.folder, _files(found)), found.folder, found.index)


def _files(pipeline: Pipeline) -> list[str]:
    return [str(Path(pipeline.folder, PIPELINE)), *(path for part in pipeline.parts.values() for path in part.paths)]


def override_of(
    reference: str,
    base: Base,
    role: str,
    kind: str = "auto",
    weights_name: str = "",
    revision: str = "",
    download: bool = False,
) -> Override:
    """An override of a base's transformer (`role` of identity.ROLES), described against it.

    Raises CheckpointError: not found, for another architecture or size, damaged, a component without config.json, or a
    transformer that the base does not have.
    """
    if role not in base.listed or base.listed[role] in (None, [None, None]):
        raise CheckpointError(
            Text("{base} has no {role}", base=base.part.name, role=role),
            reference,
            Text("give it as {roles}", roles=", ".join(one for one in ROLES if one in base.listed)),
        )
    source = location(reference, role, weights_name, revision, download)
    if download:  # only now is it known which of the two it is
        source = location(reference, role, weights_name, revision, download)
    if kind == "component" and not source.config:
        raise CheckpointError(
            Text("a component is a folder with config.json beside its weights"),
            source.folder,
            Text("give it with --kind weights"),
        )
    fits = describe_config(Checkpoint(locate(base.folder, component=role, need_weights=False)))
    description = describe(Checkpoint(source), fits)
    whole = beside_mixed(source, weights_name)
    if whole and lacks_scales(description):
        source = locate(str(whole))
        description = describe(Checkpoint(source), fits)
        description.notes.append(
            Text("{name} is taken, as {other} beside it has no scale for some activations, and SGLang takes 1.0 "
                 "for them", name=whole.name, other=whole.stem + MIXED))
    description.require_loadable()
    path = files_of(source, kind)
    return Override(part_of(path, source.paths), _kind(source, kind), path, description)


def location(reference: str, role: str, weights_name: str, revision: str = "", download: bool = False) -> Source:
    """The files of an override. A pipeline has the component in a folder of its own; a repo of one transformer is that,
    for either role. Raises CheckpointError where they are not here."""
    folders = [path for path in candidates(reference, revision) if path.is_dir()]
    component = role if any((path / PIPELINE).is_file() or (path / role).is_dir() for path in folders) else ROLES[0]
    return locate(reference, component=component, weights_name=weights_name, revision=revision, download=download)


def beside_mixed(source: Source, weights_name: str) -> Path | None:
    """The file that lies beside a -mixed one, which was found and not asked for."""
    if weights_name or len(source.files) != 1 or not source.files[0].endswith(MIXED):
        return None
    whole = Path(source.files[0].removesuffix(MIXED) + ".safetensors")
    return whole if whole.is_file() else None


def _kind(source: Source, kind: str) -> str:
    return kind if kind != "auto" else "component" if source.config else "weights"


def files_of(source: Source, kind: str) -> str:
    """The folder or file that the server is given of an override."""
    alone = _kind(source, kind) == "weights" and len(source.files) == 1
    return source.files[0] if alone else source.folder


def lacks_scales(description: CheckpointDescription) -> bool:
    """Whether some NVFP4 layers have an activation scale and others none, for which SGLang takes 1.0."""
    return description.family in NVFP4 and bool(description.static_activations and description.dynamic_activations)


def lora_of(reference: str, strength: float, download: bool = False) -> LoRA:
    """A LoRA: a file, or the one in a folder or repo. Raises CheckpointError where there is none, or more than one."""

    def chosen(folder: Folder) -> list[Selection]:
        return [select_component(folder, "")]

    def use(path: Path) -> str:
        return str(path) if path.is_file() else str(path / chosen(LocalFolder(path))[0].files[0])

    path = resolve(reference, "", use, chosen, (f"*{WEIGHTS[0]}",), download)
    if path.endswith(INDEX) or not path.endswith(WEIGHTS[:2]):
        raise CheckpointError(Text("this is no LoRA file"), path, Text("give a .safetensors file"))
    return LoRA(part_of(path, [path]), path, strength)

"""A reference -> the files of one transformer: what every family makes of a folder's names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..host.texts import Text
from .architectures import diffusers_classes
from .architectures.derived import Companion
from .errors import CheckpointError
from .families import families
from .families.repos import KNOWN_BASES
from .files import hubs
from .files.places import Fetch, LocalFolder, candidates, cleaned, resolve
from .files.selection import (
    INDEX,
    PIPELINE,
    QUANTIZE,
    Folder,
    Selection,
    component_folder,
    select_component,
    weight_file,
)
from .files.source import Source, read_json

# Components of known bases that belong to the transformer in the host (companions_of).
_COMPANIONS = {"Lightricks/LTX-2": ("connectors",)}


def select_transformer(folder: Folder, component: str = "transformer", weights_name: str = "",
                       need_weights: bool = True, choices: Any = None) -> Selection:
    """The transformer of a pipeline folder, a component folder, or a folder with one weight file or index.

    `weights_name` picks a file inside the folder. With `need_weights=False` only config.json is looked up. `choices`
    are for the family that knows of them.
    Raises MissingFiles when something is not there, CheckpointError when the choice is ambiguous.
    """
    for family in families() if need_weights else ():
        selection = family.select(folder, component, weights_name, choices)
        if selection is not None:
            return selection
    return select_component(folder, component_folder(folder, component), weights_name, need_weights)


def locate(reference: str, *, component: str = "transformer", weights_name: str = "", revision: str = "",
           need_weights: bool = True, download: bool | Fetch = False,
           choices: Any = None) -> Source:
    """Resolve a reference to the files of one transformer.

    Accepts a diffusers pipeline folder (its `component` is taken), a component folder (config.json + weights), a
    folder with one weight file or one index, an index file, or a single .safetensors file. `weights_name` picks a
    file inside the folder. With `need_weights=False` only config.json is looked up and no weight file need exist.
    `download` fetches what is missing of a repo id. `choices` are for the family that knows of them.

    Raises CheckpointError when nothing is found or the choice is ambiguous.
    """
    reference, weights_name = cleaned(reference), cleaned(weights_name)
    if not need_weights and base_of_quantized(reference) and not _has_config(reference, revision):
        return locate(base_of_quantized(reference), component=component, need_weights=False, download=download)
    select = partial(select_transformer, component=component, weights_name=weights_name, need_weights=need_weights,
                     choices=choices)

    def use(path: Path) -> Source:
        if path.is_file():
            return _from_file(reference, path, weights_name, need_weights)
        folder = LocalFolder(path)
        source = folder.source(reference, select(folder))
        return source._replace(companions=companions_of(source, source.folder, need_weights))

    def chosen(folder: Folder) -> list[Selection]:
        names = folder.names()
        selection = select(folder)
        if PIPELINE not in names:
            return [selection]
        beside = diffusers_classes.companions(folder.read_json(selection.config) if selection.config else None)
        return [Selection("", texts=(PIPELINE,)), selection, *(
            _companion(folder, part, one, need_weights) for part, one in beside.items()
            if any(name.startswith(f"{part}/") for name in names))]

    _, repo = hubs.split(reference)
    pipeline = repo in KNOWN_BASES and not base_of_quantized(reference)
    patterns: Sequence[str] = ()
    if pipeline:
        parts = (component, *_COMPANIONS.get(repo, ()))
        patterns = (PIPELINE, *(f"{part}/*" if need_weights else f"{part}/config.json" for part in parts))
    else:
        patterns = tuple(filter(None, (family.pattern(repo, weights_name, choices) for family in families())))
    return resolve(reference, revision, use, chosen, patterns, download)


def companions_of(source: Source, folder: str, need_weights: bool = True) -> tuple[Source, ...]:
    """The components that belong to a transformer by its config.json, as they lie beside the transformer of `folder`.

    Raises MissingFiles where the pipeline has one that is not there, or incomplete."""
    beside = diffusers_classes.companions(read_json(source.config) if source.config else None)
    pipeline = LocalFolder(Path(folder).parent)
    listed = read_json(str(pipeline.path / PIPELINE)) if beside and (pipeline.path / PIPELINE).is_file() else {}
    return tuple(pipeline.source(source.reference, _companion(pipeline, name, one, need_weights))
                 for name, one in beside.items() if (pipeline.path / name).is_dir() or name in listed)


def _companion(pipeline: Folder, name: str, one: Companion, need_weights: bool) -> Selection:
    if not one.place and one.config in pipeline.names(name):
        return Selection(name, config=f"{name}/{one.config}")
    return select_component(pipeline, name, need_weights=need_weights)


def base_of_quantized(reference: str) -> str:
    """The base behind a reference to quantized weights alone that is given as a base itself; empty for any other."""
    hub, _, _ = reference.rpartition(hubs.split(reference)[1])
    return next((hub + base for family in families() if (base := family.base_of(reference))), "")


def _has_config(reference: str, revision: str) -> bool:
    return any((path / "config.json").is_file() for path in candidates(reference, revision))


def _from_file(reference: str, path: Path, weights_name: str, need_weights: bool) -> Source:
    if weights_name:
        raise CheckpointError(Text("weights_name is {weights_name!r}, but the reference is already a file",
                                   weights_name=weights_name), path,
                              Text("clear weights_name, or give the folder"))
    if not need_weights:
        raise CheckpointError(Text("a single file has no config.json to build a model without weights from"), path,
                              Text("set weights to 'load', or give a diffusers folder"))
    if path.name.endswith(INDEX):
        folder = LocalFolder(path.parent)
        return folder.source(reference, select_transformer(folder, weights_name=path.name))
    weight_file(path.name, path)
    if any(family.reads_beside(str(path)) for family in families()):
        folder = LocalFolder(path.parent)
        return folder.source(reference, select_transformer(folder, weights_name=path.name))
    beside, quantize = path.parent / "config.json", path.parent / QUANTIZE
    return Source(reference, str(path.parent), (str(path),), beside=str(beside) if beside.is_file() else None,
                  texts=(str(quantize),) if quantize.is_file() else ())

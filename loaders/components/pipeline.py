"""The other components of a base: text encoders, tokenizers and VAE, each a folder of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...host.texts import Text
from ..errors import CheckpointError, MissingFiles
from ..files.places import Fetch, LocalFolder, candidates, resolve
from ..files.selection import PIPELINE, Folder, Selection, select_component, select_texts
from ..files.source import Source
from ..locate import base_of_quantized, locate, select_transformer

Wanted = Callable[[dict[str, Any]], Sequence[str]]
TEXT_FOLDERS = ("tokenizer", "processor", "feature_extractor", "image_processor", "scheduler")


@dataclass(frozen=True)
class Pipeline:
    """Local folders of the components that a load asked for.

    `index` is model_index.json (component name -> [library, class]); `parts` has one Source a component. A Source
    without weight files (`files` empty) is a tokenizer or processor folder.
    """

    reference: str
    folder: str
    index: dict[str, Any]
    parts: dict[str, Source]


def locate_parts(reference: str, wanted: Wanted, *, revision: str = "", download: bool | Fetch = False,
                 patterns: Sequence[str] = (), unloaded: bool = False) -> Pipeline:
    """Resolve a base and the components of it that `wanted(model_index)` names.

    `patterns` are globs of the components, for the download command in messages; `download` fetches what is missing of
    a repo id. `unloaded`: no weights are wanted, config.json alone. Raises CheckpointError when the base is no pipeline
    folder or a component is nowhere.
    """
    other = base_of_quantized(reference)
    if other and not any((path / PIPELINE).is_file() for path in candidates(reference, revision)):
        reference, revision = other, ""

    def chosen(folder: Folder) -> list[Selection]:
        if PIPELINE not in folder.names():
            raise MissingFiles(Text("this is no diffusers pipeline folder (it has no model_index.json)"), folder.place,
                               Text("give the base model's folder or repo id"))
        return [Selection("", texts=(PIPELINE,)),
                *(_select(folder, name, not unloaded) for name in wanted(folder.read_json(PIPELINE)))]

    def use(path: Path) -> Pipeline:
        if path.is_file():
            raise CheckpointError(Text("this is a single file, not a diffusers pipeline folder"), path,
                                  Text("give the base model's folder or repo id"))
        folder = LocalFolder(path)
        index, *parts = chosen(folder)
        return Pipeline(reference, str(path), folder.read_json(index.texts[0]),
                        {part.folder: folder.source(reference, part) for part in parts})

    return resolve(reference, revision, use, chosen, (PIPELINE, *patterns), download)


def locate_each(reference: str, *, revision: str = "", download: bool | Fetch = False) -> list[Source]:
    """The text encoders that a reference holds: all of a pipeline folder, or the one of a folder or file.

    Raises CheckpointError when nothing is found or the choice is ambiguous.
    """
    def chosen(folder: Folder) -> list[Selection]:
        if PIPELINE not in folder.names():
            return [select_transformer(folder)]
        names = sorted(name for name in folder.read_json(PIPELINE) if name.startswith("text_encoder"))
        there = [name for name in names if folder.names(name)]
        if not there:
            raise MissingFiles(Text("this pipeline has no text encoder on disk"), folder.place,
                               Text("finish its download"))
        return [Selection("", texts=(PIPELINE,)), *(select_component(folder, name) for name in there)]

    def use(path: Path) -> list[Source]:
        if path.is_file():
            return [locate(str(path))._replace(reference=reference)]
        folder = LocalFolder(path)
        return [folder.source(reference, one) for one in chosen(folder) if one.files]

    return resolve(reference, revision, use, chosen, (), download)


def _select(folder: Folder, name: str, need_weights: bool) -> Selection:
    if name.startswith(TEXT_FOLDERS):
        return select_texts(folder, name)
    if not folder.names(name):
        raise MissingFiles(Text("the base has no {name} on disk", name=name), folder.place, Text("finish its download"))
    return select_component(folder, name, need_weights=need_weights)

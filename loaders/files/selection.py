"""Which files of a folder make up a component: one rule for folders on disk and for repos on the Hub.

Works on names alone, so that the same choice is made before a download and after it. Names are relative to the folder
and use forward slashes. The order is SGLang-Diffusion's (docs/sources/sglang.md, "Which weight files").
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Protocol

from ...host.texts import Text
from ..errors import CheckpointError, MissingFiles
from ..words import first_ten

INDEX = ".safetensors.index.json"
QUANTIZE = "quantize_config.json"  # where GPTQ's tools wrote what config.json says by now
PIPELINE = "model_index.json"
UNET = "unet"  # what pipelines have instead of a transformer
COMPONENTS = ("transformer", "transformer_2")
DENOISERS = (*COMPONENTS, UNET)
WEIGHTS = (".safetensors", ".sft", ".gguf")
# What a tokenizer or processor folder may hold; anything else in it is not read and not downloaded.
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# Patterns are compiled when they are first used: ComfyUI imports this module at every start.
# A precision infix, as diffusers' `variant` writes it into weight and index files.
_PRECISION = r"\.(fp16|bf16|fp32)(?=(-\d+-of-\d+)?\.safetensors|\.json$)"
_MIXED = r"-mixed(-\d+-of-\d+)?\.safetensors$"
# The names of a model in several files, of llama.cpp and of huggingface_hub's shards
SPLIT = r"-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)$"
_LONGEST, _LONGEST_PATH = 200, 1000  # bytes of a name (file systems take 255), characters of all of it
_INDEXES = r"\.safetensors\.index(\.[^./]+)?\.json$"


class Folder(Protocol):
    """A folder on disk or in a repo. `place` names it in messages."""

    @property
    def place(self) -> str: ...

    def names(self, below: str = "") -> list[str]:
        """The names of all files under the subfolder `below`, relative to it."""
        ...

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object by name. Raises CheckpointError when it is none."""
        ...


class Selection(NamedTuple):
    """The files of one component, by name from the root of the `Folder` they were chosen from."""

    folder: str  # "" or "transformer"
    files: tuple[str, ...] = ()
    config: str | None = None
    index_file: str | None = None
    texts: tuple[str, ...] = ()  # a tokenizer's files, a ModelSlim description, or QUANTIZE
    choice: str = ""

    @property
    def names(self) -> list[str]:
        """Everything to fetch, small files first: a set that was cut short then lacks its weights, and shows it."""
        return [name for name in (self.config, self.index_file, *self.texts, *self.files) if name]


Select = Callable[[Folder], Sequence[Selection]]


def leaves_folder(name: str) -> bool:
    """Whether a file name points out of its folder, on any system (a drive letter does on Windows)."""
    pure = PurePosixPath(name.replace("\\", "/"))
    return pure.is_absolute() or ".." in pure.parts or ":" in name or "\0" in name


def strange_name(name: str) -> bool:
    """Whether a name, with its folders, cannot be that of a downloaded file on every system: it leaves its folder, has
    no room for what is put behind it meanwhile, or has letters or parts that systems change or do not take."""
    parts = name.split("/")
    return leaves_folder(name) or not_of_files(name, 200, 1000) or "\\" in name \
        or any(part.strip(". ") == "" or any(ord(letter) < 32 or ord(letter) == 127 for letter in part)
               for part in parts) or os.name == "nt" and PureWindowsPath(name).is_reserved()


def not_of_files(name: str, longest: int = 255, path: int = 4000) -> bool:
    """Whether no file system takes a path with forward slashes: a part of it has more bytes than `longest`, all of it
    more than `path`, or it has a zero, or what cannot be written in bytes."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return True
    return "\0" in name or len(encoded) > path or max(map(len, encoded.split(b"/"))) > longest


def select_component(folder: Folder, name: str, weights_name: str = "", need_weights: bool = True) -> Selection:
    """The config and weight files of the subfolder `name` ("" for the folder itself), and its QUANTIZE."""
    inside = folder.names(name)
    where = f"{folder.place}/{name}" if name else folder.place

    def path(file: str) -> str:
        return f"{name}/{file}" if name else file

    config = path("config.json") if "config.json" in inside else None
    texts = (path(QUANTIZE),) if QUANTIZE in inside else ()
    if not need_weights:
        if config is None:
            raise MissingFiles(Text("there is no config.json to build a model without weights from"), where,
                               Text("set weights to 'load', or give a diffusers folder"))
        return Selection(name, (), config)
    if weights_name:
        if leaves_folder(weights_name):
            raise CheckpointError(Text("weights_name must stay inside the folder"), weights_name,
                                  Text("give a plain file name"))
        chosen = weights_name.replace("\\", "/")
        if chosen not in inside:
            raise MissingFiles(Text("the folder holds no {name}", name=weights_name), where,
                               Text("it holds {names}", names=_listing(inside)))
        choice = ""
    else:
        chosen, choice = _choose(inside, where)
    if not re.search(_INDEXES, chosen):
        weight_file(chosen, where)
        files = parts(chosen, inside, where)
        if len(files) > 1:
            choice = choice or Text("{count} shards without an index, by their names", count=len(files))
        return Selection(name, tuple(map(path, files)), config, texts=texts, choice=choice)
    subfolder = chosen.rpartition("/")[0]
    shards = index_shards(folder.read_json(path(chosen)), f"{where}/{chosen}")
    if subfolder:
        shards = [f"{subfolder}/{shard}" for shard in shards]
        config = config or (path(f"{subfolder}/config.json") if f"{subfolder}/config.json" in inside else None)
    there = set(inside)
    missing = [shard for shard in shards if shard not in there]
    if missing:
        raise MissingFiles(Text("{count} of {all} shards are missing: {names}", count=len(missing),
                                all=len(shards), names=first_ten(missing)),
                           f"{where}/{chosen}", Text("finish the download of this folder"))
    return Selection(name, tuple(map(path, shards)), config, path(chosen), texts, choice)


def select_texts(folder: Folder, name: str) -> Selection:
    """The files of a tokenizer or processor folder. Raises MissingFiles when there are none."""
    texts = tuple(f"{name}/{file}" for file in sorted(folder.names(name))
                  if "/" not in file and file.endswith(TEXT_SUFFIXES))
    if not texts:
        raise MissingFiles(Text("the base has no {name} on disk", name=name), folder.place, Text("finish its download"))
    return Selection(name, config=f"{name}/config.json" if f"{name}/config.json" in texts else None, texts=texts)


def weight_file(name: str, where: object = "") -> None:
    """Raise CheckpointError unless the name is that of a safetensors or GGUF file."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in WEIGHTS:
        what = Text("{suffix} files are not read: only .safetensors and .gguf", suffix=suffix) if suffix else \
            Text("this kind of files are not read: only .safetensors and .gguf")
        raise CheckpointError(what, where or name, Text("pick a .safetensors or .gguf file"))


def parts(name: str, names: Collection[str], where: str) -> tuple[str, ...]:
    """A file, or all parts of the model that it is one of, by name. Raises MissingFiles for those not in `names`."""
    split = re.search(SPLIT, name)
    if split is None:
        return (name,)
    found = tuple(f"{name[:split.start()]}-{i + 1:05d}-of-{split[2]}{split[3]}" for i in range(int(split[2])))
    there = set(names)
    missing = [part for part in found if part not in there]
    if missing:
        what = Text("parts") if split[3] == ".gguf" else Text("shards")
        raise MissingFiles(Text("{count} of {all} {what} are missing: {names}", count=len(missing), all=len(found),
                                what=what, names=first_ten(missing)), where,
                           Text("finish the download of this folder"))
    return found


def index_shards(index: dict[str, Any], where: str) -> list[str]:
    """The shards that an index names. Each must be a .safetensors file inside the index's folder."""
    names = sorted(set(index["weight_map"].values()))  # its types were looked at when it was read
    if not names:
        raise CheckpointError(Text("the index names no tensors"), where, Text("download the index again"))
    for name in names:
        if leaves_folder(name):
            raise CheckpointError(Text("the index names a file outside its folder: {name!r}", name=name), where,
                                  Text("do not use this checkpoint; get it from its publisher"))
        if not name.endswith(".safetensors"):
            raise CheckpointError(Text("the index names {name!r}, which is no .safetensors file", name=name), where,
                                  Text("only safetensors shards are read"))
    return names


def component_folder(folder: Folder, component: str) -> str:
    """The subfolder of one component: below a pipeline folder, or "" for the folder itself."""
    inside = folder.names()
    if PIPELINE in inside:
        if component == "transformer" and not _has(component, inside) and _has(UNET, inside):
            return UNET
        if not _has(component, inside):
            there = [part for part in DENOISERS if _has(part, inside)]
            listed = folder.read_json(PIPELINE).get(component)
            error = MissingFiles if listed and listed[0] else CheckpointError
            what = Text("this pipeline has no {component} on disk", component=component) if error is MissingFiles else \
                Text("this pipeline has no {component}", component=component)
            raise error(what, folder.place,
                        Text("its transformers here: {names}", names=", ".join(there) or Text("none")))
        return component
    if component != "transformer":
        raise CheckpointError(Text("{component} needs a pipeline folder (model_index.json), this is a single component",
                                   component=component), folder.place,
                              Text("give the pipeline folder, or the {component} folder with component transformer",
                                   component=component))
    at_top = "config.json" in inside or any("/" not in name and ".safetensors" in name for name in inside)
    nested = any(name.startswith(f"{component}/") for name in inside)
    return component if nested and not at_top else ""


def _has(component: str, inside: list[str]) -> bool:
    return any(name.startswith(f"{component}/") for name in inside)


def _choose(inside: list[str], where: str) -> tuple[str, str]:
    """(the index or weight file to use, why).

    Precision twins of a canonical file are set aside; an index is the authority; without one a single file is taken, or
    the first of one model's shards, and of several the one that is called -mixed. Anything else is ambiguous and raises
    CheckpointError.
    """
    top = sorted(name for name in inside if "/" not in name)
    indexes, _ = _without_twins([name for name in top if re.search(_INDEXES, name)])
    if len(indexes) > 1:
        raise CheckpointError(Text("there are {count} index files: {names}", count=len(indexes),
                                   names=first_ten(indexes)), where,
                              Text("name the one to use in weights_name"))
    if indexes:
        return indexes[0], ""
    found = ([name for name in top if name.endswith(".safetensors")]
             or sorted(name for name in inside if name.endswith(".safetensors")))
    files, choice = _without_twins(found)
    mixed = [name for name in files if re.search(_MIXED, name)]
    if len(files) > 1 and len(mixed) == 1:
        files, choice = mixed, Text("{name} taken of {count} files: the mixed one", name=mixed[0], count=len(found))
    if len({re.sub(SPLIT, r"-of-\2", name) for name in files}) == 1 and re.search(SPLIT, files[0]):
        files = files[:1]  # all of one model
    if len(files) > 1:
        raise CheckpointError(Text("there are {count} weight files without an index: {names}", count=len(files),
                                   names=first_ten(files)), where,
                              Text("name the one to use in weights_name"))
    if not files:
        raise MissingFiles(Text("there is no .safetensors file"), where,
                           Text("the folder holds {names}", names=_listing(inside)))
    return files[0], choice


def _without_twins(names: list[str]) -> tuple[list[str], str]:
    """Drop files that differ from another only by a precision infix; a family that has only such files is kept."""
    kept = [name for name in names if not re.search(_PRECISION, name) or re.sub(_PRECISION, "", name) not in names]
    dropped = [name for name in names if name not in kept]
    return kept, Text("precision twins left aside: {names}", names=first_ten(dropped)) if dropped else ""


def _listing(inside: list[str]) -> str:
    return first_ten(sorted({name.split("/")[0] for name in inside})) or Text("nothing")

"""One transformer of a ModelSlim export, opened as far as its headers, and what files a folder may hold."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...host.texts import Text
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.errors import CheckpointError, MissingFiles
from ...loaders.files.frozen import Frozen
from ...loaders.files.selection import INDEX, index_shards
from ...loaders.files.source import Source, read_json
from ...loaders.words import first_ten

DESCRIPTION, WEIGHTS = "quant_model_description", "diffusion_pytorch_model"


@dataclass(frozen=True)
class Expert:
    """One transformer of the source: its folder, headers, description and the files beside them; all of them as they
    were before they were read (`frozen`)."""

    folder: Path
    checkpoint: Checkpoint
    description: Path
    entries: dict[str, Any]
    others: list[str]
    frozen: Frozen


def descriptions(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob(f"{DESCRIPTION}*.json")) if not path.name.endswith(".index.json")]


def read_expert(folder: Path) -> Expert:
    """Open one transformer as far as its headers; its description must name its tensors, no more and no fewer."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found = descriptions(folder) if folder.is_dir() else []
    if not found:
        raise MissingFiles(Text("there is no {name}*.json", name=DESCRIPTION), folder,
                           Text("this tool repacks ModelSlim exports: give one"))
    frozen = Frozen(folder / name for name in names)
    indexes = [name for name in names if name.endswith(INDEX)]
    if len(indexes) > 1:
        raise CheckpointError(Text("there are {count} index files: {indexes}", count=len(indexes),
                                   indexes=first_ten(indexes)), folder, Text("leave only one export in the folder"))
    weights = [name for name in names if name.endswith(".safetensors")]
    weights = ([n for n in weights if n.startswith("quant_model_weight")]
               or [n for n in weights if n.startswith(WEIGHTS)] or weights)
    if indexes:
        shards = index_shards(read_json(str(folder / indexes[0])), str(folder / indexes[0]))
        lost = [name for name in shards if name not in weights]
        if lost:
            raise MissingFiles(Text("{count} of {all} shards are missing: {names}", count=len(lost), all=len(shards),
                                    names=first_ten(lost)), folder, Text("finish the download of this folder"))
        weights = shards
    if not weights:
        raise MissingFiles(Text("there is no .safetensors file"), folder, Text("finish the download of this folder"))
    stray = [name for name in names if name.endswith(".safetensors") and name not in weights]
    if stray:
        raise CheckpointError(Text("there are weight files that belong to nothing: {names}", names=first_ten(stray)),
                              folder, Text("leave only one export in the folder"))
    used = {*weights, *indexes, *(path.name for path in found)}
    for name in names:
        check_file(folder / name, folder)
    checkpoint = Checkpoint(Source(str(folder), str(folder), tuple(str(folder / name) for name in weights),
                                   index_file=str(folder / indexes[0]) if indexes else None))
    read = [(path, read_json(str(path))) for path in found]
    fitting = [(path, entries) for path, entries in read if not _mismatch(entries, checkpoint)]
    if len(read) > 1 and len(fitting) != 1:
        raise CheckpointError(Text("there are {count} descriptions: {names}", count=len(read),
                                   names=first_ten(p.name for p in found)), folder,
                              Text("leave only the one of these weights in the folder"))
    if not fitting:
        raise CheckpointError(_mismatch(read[0][1], checkpoint), read[0][0],
                              Text("export again, or finish the download; weights and description do not belong "
                                   "together"))
    return Expert(folder, checkpoint, *fitting[0], [name for name in names if name not in used], frozen)


def named(entries: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """The keys of a description that name a tensor; the others are about the whole model."""
    return [key for key, value in entries.items() if isinstance(value, str)
            and (key in checkpoint.tensors or "." in key)]


def _mismatch(entries: dict[str, Any], checkpoint: Checkpoint) -> str:
    """Where a description and the tensors differ; empty when they fit."""
    keys = set(named(entries, checkpoint))
    absent = sorted(key for key in keys - checkpoint.tensors.keys() if not key.endswith(".quant_type"))
    silent = sorted(checkpoint.tensors.keys() - keys)
    if absent:
        return Text("the description names {count} tensors that are not there: {names}", count=len(absent),
                    names=first_ten(absent))
    return Text("the description says nothing of {count} tensors: {names}", count=len(silent),
                names=first_ten(silent)) if silent else ""


def check_file(path: Path, root: Path) -> Path:
    """The real file behind `path`. Raises CheckpointError for anything but a file in `root`.

    Links of the Hugging Face cache (snapshots to blobs) are followed; one that leaves its folder otherwise is not.
    """
    real, top = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    cache = [folder.parent.parent / "blobs" for folder in (top, *top.parents) if folder.parent.name == "snapshots"]
    if not any(real.is_relative_to(allowed) for allowed in (top, *cache)):
        raise CheckpointError(Text("a link leaves its folder: it shows {file}", file=real), path,
                              Text("put the file itself there"))
    if not path.exists() or not stat.S_ISREG(os.stat(real).st_mode):
        raise CheckpointError(Text("this is no ordinary file"), path, Text("remove it, or finish the download"))
    return real

"""A reference in a workflow, and how its files are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ... import host
from ...host.texts import Text
from ...loaders import loras
from ...loaders.errors import CheckpointError
from ...loaders.files.places import Fetch, find_path
from ...loaders.files.source import Source

# load(download) -> the files, found or fetched. Raises CheckpointError as nodes do.
Load = Callable[[bool | Fetch], list[Source]]


@dataclass(frozen=True)
class Asked:
    """A reference and where it stands: node, its class, its input. `component`: of which transformer of a pipeline.

    `load` is None for what comes by a link, or is on a server; `fetched`: a hub's repo will do for its files. `parts`
    are references of the same node that take the place of parts of this one.
    """

    node: str
    kind: str
    input: str
    reference: str
    component: str = ""
    load: Load | None = None
    fetched: bool = False
    parts: tuple[str, ...] = ()


def listed(folder: str, name: str) -> Load:
    """A file by a name of ComfyUI's list of a folder ("loras"), as its own loaders find it."""
    def find() -> str:
        path = host.model_file(folder, name)
        if path:
            return path
        slashed = name.replace("\\", "/")
        if slashed != name and host.model_file(folder, slashed):
            raise CheckpointError(
                Text("ComfyUI on this system takes no backslashes: here it is {name}", name=slashed), name,
                Text("choose it again in the node's list, or write it so"))
        if not name:
            raise CheckpointError(Text("no checkpoint is chosen"), "", Text("choose a file in the node's list"))
        raise CheckpointError(Text("ComfyUI has no such file in its folder {folder}", folder=folder), name,
                              Text("put it there, or name its folder in extra_model_paths.yaml"))

    return lambda download: [_source(find())]


def lora(name: str) -> Load:
    """A file by the name or path that Load LoRA for Transformer has."""
    return lambda download: [_source(loras.find(name, ""))]


def read(reference: str) -> Load:
    """What the nodes that make files read: on this machine, whatever it holds."""
    return lambda download: [_source(str(find_path(reference)))]


def refused(error: CheckpointError) -> Load:
    """What no file can be found for."""
    return partial(_refuse, error)


def _refuse(error: CheckpointError, download: bool | Fetch) -> list[Source]:
    raise error


def _source(path: str) -> Source:
    return Source(path, os.path.dirname(path), (path,))

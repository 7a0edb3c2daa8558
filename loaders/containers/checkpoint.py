"""A checkpoint as headers: which tensors there are and what the files claim. No tensor bytes are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text
from ..errors import CheckpointError
from ..files.frozen import Frozen
from ..files.source import Source, open_file, read_json
from ..files.strict import Invalid
from ..words import first_ten
from . import gguf, safetensors
from .safetensors import Header, TensorInfo

if TYPE_CHECKING:
    import torch


def read_header(path: str) -> Header:
    """The header of a weight file, by its first bytes. Raises CheckpointError for a damaged one."""
    try:
        with open_file(path) as file:
            start = file.read(len(gguf.MAGIC))
    except OSError:
        start = b""  # safetensors.read_header says why
    return gguf.read_header(path) if start == gguf.MAGIC else safetensors.read_header(path)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Checkpoint:
    """The files of one transformer, opened as far as their headers.

    Attributes: `source`, `headers` (one a file), `tensors` (name -> TensorInfo, all files), `preferences` (those of
    attention.py, which are no weights and not among `tensors`), `config` (config.json of the component, or None; in it
    those of its companions, under "_" and their folder's name), `frozen` (the files, as they were before they were
    opened).
    `stored_tensors` are the tensors under the names of the files, `tensors` those that count, as `call` names them.
    `claimed` is what families/declarations.py has found in `config` and `metadata`, for all families that ask.
    `settled`: `know_as` has said what the files' names mean, and no family looks for prefixes in them.
    """

    settled = False
    claimed: tuple[dict[str, Any], tuple[str, ...]] | None = None

    def __init__(self, source: Source) -> None:
        """Read the headers. Raises CheckpointError for a damaged file or shards that contradict each other."""
        self.source, self.frozen = source, Frozen(source.paths)
        self.headers = [read_header(path) for one in (source, *source.companions) for path in one.files]
        self.config: dict[str, Any] | None = None
        if source.config:
            self.config = read_json(source.config) | {
                f"_{os.path.basename(one.folder)}": read_json(one.config) for one in source.companions if one.config}
        self.tensors: dict[str, TensorInfo] = self.headers[0].tensors if len(self.headers) == 1 else {}
        if len(self.headers) > 1:
            self._merge_shards()
        if source.index_file:
            self._check_index(source.index_file)
        self.preferences = {name: info for name, info in self.tensors.items() if name.endswith(host.PREFERENCE)}
        if self.preferences:
            self.tensors = {name: info for name, info in self.tensors.items() if name not in self.preferences}
        self.stored_tensors = self.tensors
        self._called: Mapping[str, str] | None = None
        self._known: Mapping[str, str] | None = None
        self._right: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def know_as(self, names: Mapping[str, str],
                right: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None) -> None:
        """Before any family looks: what the files' tensors are called by whoever asks for them (name -> name in the
        file); others are left out. `right` makes of a tensor, as stored, what was meant (rows in another order)."""
        self.stored_tensors = self.tensors = {name: self.tensors[stored] for name, stored in names.items()}
        self._known, self._right, self.settled = names, right or {}, True

    def call(self, names: Mapping[str, str]) -> None:
        """Let tensors go by other names from now on (name -> stored name); those not among them are left out."""
        self.tensors = {name: self.stored_tensors[stored] for name, stored in names.items()}
        self._called = names

    def stored(self, name: str) -> str:
        """What a tensor is called among the `stored_tensors`."""
        return (self._called or {}).get(name, name)

    def in_file(self, name: str) -> str:
        """What the files themselves call a tensor, and what their configuration calls its layer by."""
        stored = self.stored(name)
        return (self._known or {}).get(stored, stored)

    def _merge_shards(self) -> None:
        for header in self.headers:
            twice = self.tensors.keys() & header.tensors.keys()
            if twice:
                raise CheckpointError(Text("two shards hold the same tensors: {twice}", twice=first_ten(sorted(twice))),
                                      header.path, Text("download the folder again; its shards do not belong together"))
            self.tensors.update(header.tensors)
        try:
            safetensors.check_names(self.tensors)
        except Invalid as error:
            raise CheckpointError(Text("{error} of one checkpoint", error=error), self.source.reference,
                                  Text("get it from its publisher; it may be damaged")) from error

    def _check_index(self, index: str) -> None:
        listed = read_json(index)["weight_map"]
        lost = [name for name in listed if name not in self.tensors]
        if lost:
            raise CheckpointError(Text("the index lists tensors that no shard holds: {lost}", lost=first_ten(lost)),
                                  index, Text("download the folder again; its shards do not belong together"))

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files' headers, those of the first where they differ."""
        return {key: value for header in reversed(self.headers) for key, value in header.metadata.items()}

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weight files, in bytes."""
        return sum(header.size for header in self.headers)

    def load_tensors(self) -> dict[str, torch.Tensor]:
        """All `tensors` by name, memory-mapped: bytes come in when they are used."""
        tensors: dict[str, torch.Tensor] = {}
        for header in self.headers:
            tensors.update(header.load())
        for name in self.preferences:
            del tensors[name]
        if self._known is not None:
            tensors = {name: self._right.get(name, _as_it_is)(tensors[stored]) for name, stored in self._known.items()}
        return {name: tensors[stored] for name, stored in self._called.items()} if self._called else tensors

    def read(self, name: str) -> bytes:
        """The bytes of one small tensor."""
        stored = self.in_file(name)
        return next(header for header in self.headers if stored in header.tensors).read(stored)

"""A transformer as the builders read it: headers at once, tensors by plain reads when they are wanted.

Nothing is memory-mapped: a build goes once through files that may be larger than the memory, and a file that shrinks
meanwhile is an error then instead of a bus error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...host.texts import Text
from ...loaders.containers.checkpoint import Checkpoint
from ...loaders.containers.safetensors import TORCH_DTYPES, TensorInfo
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Changed
from ...loaders.files.selection import TEXT_SUFFIXES
from ...loaders.locate import locate
from ...quant.stored import PLAIN_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...loaders.containers.writing import Parts, Put

T = TypeVar("T")
SPAN = 1 << 21  # elements that one thread reads and works on at a time


class Component:
    """The transformer that a reference names: `tensors` by stored name, `config`, the folder it lies in, and its files
    as they were before anything was read of them (`frozen`)."""

    def __init__(self, reference: str, *, bare: bool = False) -> None:
        """Find it and read its headers. `bare`: weights without config.json will do. Raises CheckpointError when that
        fails, and for a component without config.json or in several files without an index."""
        self.checkpoint = Checkpoint(locate(reference))
        source, self.frozen = self.checkpoint.source, self.checkpoint.frozen
        if source.config is None and not bare:
            raise CheckpointError(Text("there is no config.json beside the weights"), source.folder,
                                  Text("give a diffusers folder: the transformer's, or one with a subfolder "
                                       "'transformer'"))
        self.config: dict[str, Any] = self.checkpoint.config or {}
        self.class_name = str(self.config.get("_class_name") or "")
        self.tensors = self.checkpoint.tensors
        self.folder = Path(source.folder)
        self.paths = [Path(path) for path in source.paths]
        self._places: dict[str, tuple[str, int]] = {}
        for header in self.checkpoint.headers:
            data = header.data_start
            self._places |= {name: (header.path, data + info.start) for name, info in header.tensors.items()}

    @property
    def names(self) -> list[str]:
        """All tensors, in the order they lie in the files."""
        return sorted(self._places, key=self._places.__getitem__)

    def texts(self) -> dict[str, Path]:
        """The files beside the weights that go along (licences, notes): name -> path. No weights, code or pickles."""
        skip = {path.name for path in self.paths} | {"config.json", "model_index.json"}
        return {entry.name: Path(entry.path) for entry in os.scandir(self.folder)
                if entry.is_file() and entry.name not in skip and not entry.name.startswith(".")
                and not entry.name.endswith(".index.json")
                and (entry.name.endswith((*TEXT_SUFFIXES, ".md")) or "." not in entry.name)}

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return self._places[name][0]

    def read(self, name: str) -> Tensor:
        """A whole tensor in memory of its own, for small ones. Raises CheckpointError when it holds NaN or infinity."""
        import torch

        out = torch.empty(self.tensors[name].shape, dtype=self._dtype(name))
        flat = out.view(-1)
        for _ in self.spans(name, lambda start, part, _: flat[start:start + part.numel()].copy_(part)):
            pass
        return out

    def amax(self, name: str) -> float:
        """The largest magnitude of a float tensor. Raises CheckpointError when it holds NaN or infinity."""
        return max(self.spans(name, lambda start, part, largest: largest), default=0.0)

    def copy(self, name: str, put: Put) -> Parts:
        """The tensor as it is stored, to `put`. Raises CheckpointError when it holds NaN or infinity."""
        return self.spans(name, lambda start, part, _: put(name, start, part))

    def spans(self, name: str, use: Callable[[int, Tensor, float], T], amax: float | None = None,
              first: int = 0, count: int | None = None) -> Generator[T, None, None]:
        """What `use(first element, values, largest magnitude)` returns for every span of a tensor, in their order; it
        is called on several threads, with values that are good until it returns. Of a part of the tensor: `count`
        elements from `first` on, which is then element 0.

        Raises CheckpointError when it holds NaN or infinity; not looked for where `amax` is known already.
        """
        import torch

        info, dtype = self.tensors[name], self._dtype(name)

        def work(start: int, number: int) -> T:
            part = scratch("span", number, dtype)
            self._read_into(name, (first + start) * dtype.itemsize, part.view(torch.uint8).numpy())
            return use(start, part, self._largest(name, info, part) if amax is None else amax)

        return in_spans(prod(info.shape) - first if count is None else count, work)

    def _dtype(self, name: str) -> torch.dtype:
        import torch

        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(Text("{name} is stored as {dtype}, which no builder copies", name=name,
                                       dtype=info.dtype), self.where(name), Text("convert it to BF16 first"))
        return getattr(torch, TORCH_DTYPES[info.dtype])

    def _read_into(self, name: str, start: int, data: Any) -> None:
        path, place = self._places[name]
        view = memoryview(data).cast("B")
        with open(path, "rb", buffering=0) as file:
            file.seek(place + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise Changed(path, Text("it ends within {name}", name=name))
                view = view[count:]

    def _largest(self, name: str, info: TensorInfo, part: Tensor) -> float:
        from ...quant.convert.blocks import largest

        if info.dtype not in (*PLAIN_DTYPES, "F8_E4M3"):
            return 0.0
        try:
            return largest(part)
        except ValueError as error:
            raise CheckpointError(Text("{name} {problem}", name=name, problem=error), self.where(name),
                                  Text("download the file again, or ask its publisher; nothing was written")
                                  ) from error


_LOCAL = threading.local()


def scratch(use: str, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements of this thread's memory for `use`, good until it asks for them again: fresh pages cost more than
    what is done with them here."""
    import torch

    memory = _LOCAL.__dict__.setdefault("memory", {})
    size = count * dtype.itemsize
    if use not in memory or memory[use].numel() < size:
        memory[use] = torch.empty(size, dtype=torch.uint8)
    return memory[use][:size].view(dtype)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    import torch

    count = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    before = torch.get_num_threads()
    started = threading.Barrier(count)

    def alone(_: int) -> None:
        started.wait()  # until every thread has one of these
        torch.get_num_threads()  # what sets a thread up; later it would undo the next line
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "qt-build")
    list(pool.map(alone, range(count)))
    torch.set_num_threads(before)  # threads to come take over what was set last, on whatever thread
    return pool


def in_spans(total: int, work: Callable[[int, int], T]) -> Generator[T, None, None]:
    """What `work(start, count)` returns for every span of `total` elements, on several threads where there are several
    spans. When this ends, however it does, no thread works for it any more."""
    starts = range(0, total, SPAN)
    if len(starts) < 2:
        for start in starts:
            yield work(start, total)
        return
    begun = [_threads().submit(work, start, min(SPAN, total - start)) for start in starts]
    try:
        for future in begun:
            yield future.result()
    finally:
        for future in begun:
            future.cancel()
        wait(begun)

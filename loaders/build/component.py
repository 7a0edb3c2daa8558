"""A transformer as the builders read it: headers at once, tensors by plain reads when they are wanted.

Nothing is memory-mapped: a build goes once through files that may be larger than the memory, and a file that shrinks
meanwhile is an error then instead of a bus error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...quant.formats import PLAIN_DTYPES
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..headers import DTYPE_BITS, TensorInfo
from ..selection import TEXT_SUFFIXES
from ..sources import locate

if TYPE_CHECKING:
    from torch import Tensor

SPAN = 1 << 20  # elements that one thread reads and works on at a time
_TORCH = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BF16": "bfloat16", "F16": "float16", "F32": "float32",
          "F64": "float64", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}


class Component:
    """The transformer that a reference names: `tensors` by name, `config`, and the folder it lies in."""

    def __init__(self, reference: str) -> None:
        """Find it and read its headers. Raises CheckpointError when that fails, and for a component without config.json
        or in several files without an index."""
        self.checkpoint = Checkpoint(locate(reference))
        source = self.checkpoint.source
        if source.config is None:
            raise CheckpointError("there is no config.json beside the weights", source.folder,
                                  "give a diffusers folder: the transformer's, or one with a subfolder 'transformer'")
        self.config: dict[str, Any] = self.checkpoint.config or {}
        self.class_name = str(self.config.get("_class_name") or "")
        self.tensors = self.checkpoint.tensors
        self.folder = Path(source.folder)
        self.paths = [Path(path) for path in source.paths]
        self._places: dict[str, tuple[str, int]] = {}
        for header in self.checkpoint.headers:
            data = header.size - max((info.end for info in header.tensors.values()), default=0)
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

    def read(self, name: str, memory: Memory | None = None) -> Tensor:
        """A whole tensor, in `memory` or in memory of its own. Raises CheckpointError when it holds NaN or infinity."""
        return self.read_amax(name, memory)[0]

    def read_amax(self, name: str, memory: Memory | None = None) -> tuple[Tensor, float]:
        """The same, and its largest magnitude (0 for integers)."""
        import torch

        info = self.tensors[name]
        if info.dtype not in _TORCH:
            raise CheckpointError(f"{name} is stored as {info.dtype}, which no builder copies", self.where(name),
                                  "convert it to BF16 first")
        out = (memory or Memory()).empty(info.shape, info.dtype).view(-1)
        data = out.view(torch.uint8).numpy()
        size = DTYPE_BITS[info.dtype] // 8

        found = [0.0]

        def copy(start: int, count: int) -> None:
            self._read_into(name, start * size, data[start * size:(start + count) * size])
            found.append(self._largest(name, info, out[start:start + count]))

        in_spans(out.numel(), copy)
        return out.view(info.shape), max(found)

    def amax(self, name: str) -> float:
        """The largest magnitude of a float tensor. Raises CheckpointError when it holds NaN or infinity."""
        found = [0.0]
        self.each_span(name, lambda start, part, largest: found.append(largest))
        return max(found)

    def each_span(self, name: str, use: Callable[[int, Tensor, float], object], amax: float | None = None) -> None:
        """Call `use(first element, values, largest magnitude)` with every span of a tensor, on several threads, in no
        certain order. Raises CheckpointError when it holds NaN or infinity; not looked for where `amax` says it all."""
        import torch

        info = self.tensors[name]
        size = DTYPE_BITS[info.dtype] // 8

        def work(start: int, count: int) -> None:
            if not hasattr(_LOCAL, "memory"):
                _LOCAL.memory = Memory()
            _LOCAL.memory.reuse(SPAN * size)
            part = _LOCAL.memory.empty((count,), info.dtype)
            self._read_into(name, start * size, part.view(torch.uint8).numpy())
            use(start, part, self._largest(name, info, part) if amax is None else amax)

        in_spans(prod(info.shape), work)

    def _read_into(self, name: str, start: int, data: Any) -> None:
        path, place = self._places[name]
        view = memoryview(data).cast("B")
        with open(path, "rb", buffering=0) as file:
            file.seek(place + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"the file ends within {name}: it changed meanwhile", path,
                                          "run this again when nothing writes to it")
                view = view[count:]

    def _largest(self, name: str, info: TensorInfo, part: Tensor) -> float:
        from ...quant.convert.blocks import largest

        if info.dtype not in (*PLAIN_DTYPES, "F8_E4M3"):
            return 0.0
        try:
            return largest(part)
        except ValueError as error:
            raise CheckpointError(f"{name} {error}", self.where(name),
                                  "download the file again, or ask its publisher; nothing was written") from error


class Memory:
    """Memory for tensors that is used again: fresh pages cost more than what is done with them here."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0

    def reuse(self, size: int) -> None:
        """Tensors made so far are done with; the next ones take `size` bytes in all."""
        import torch

        self._used = 0
        if self._block is None or self._block.numel() < size:
            self._block = None  # before the larger one is there
            self._block = torch.empty(size, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """An uninitialised tensor; `dtype` is the name in safetensors. Beyond what was announced: memory of its own."""
        import torch

        end = self._used + prod(shape) * DTYPE_BITS[dtype] // 8
        if self._block is None or end > self._block.numel():
            return torch.empty(shape, dtype=getattr(torch, _TORCH[dtype]))
        part = self._block[self._used:end]
        self._used = aligned(end)
        return part.view(getattr(torch, _TORCH[dtype])).view(shape)


def aligned(size: int) -> int:
    """What a tensor of `size` bytes takes of a `Memory`."""
    return -(-size // 64) * 64


_LOCAL = threading.local()


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(8, count), "qt-build")


def in_spans(total: int, work: Callable[[int, int], object]) -> None:
    """Call `work(start, count)` for every span of `total` elements, on several threads where there are several."""
    starts = range(0, total, SPAN)
    if len(starts) < 2:
        for start in starts:
            work(start, total)
        return
    list(_threads().map(lambda start: work(start, min(SPAN, total - start)), starts))

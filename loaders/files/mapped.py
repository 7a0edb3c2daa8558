"""Tensors that are views of memory-mapped files, by plain reads: where a file is cut meanwhile these are an error, and
touching the mapping would end the process (SIGBUS)."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ...host.texts import Text
from .frozen import Changed

if TYPE_CHECKING:
    from torch import Tensor

_PROC = "/proc/self/smaps"  # Linux; Windows lets nobody cut a file that is mapped


class _Span(NamedTuple):
    """Addresses that show a file from byte `offset` on. `own`: pages were written to, and are the process's own."""

    start: int
    end: int
    offset: int
    inode: int
    path: str
    own: bool


class Mapped:
    """Which of some tensors are views of files. They stay mapped as long as this is there, so that an address of theirs
    is of nothing else."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        import torch

        spans = list(_joined(_spans()))
        starts = [span.start for span in spans]
        self._places: dict[int, tuple[_Span, torch.UntypedStorage]] = {}
        for tensor in tensors:
            if _is_plain(tensor):
                at = bisect_right(starts, tensor.data_ptr()) - 1
                if at >= 0 and tensor.data_ptr() < spans[at].end:
                    storage = tensor.untyped_storage()
                    self._places[storage.data_ptr()] = spans[at], storage

    @property
    def files(self) -> list[str]:
        """The files, as far as they still have their names."""
        found = {place.path: place.inode for place, _ in self._places.values()}
        return [path for path, inode in found.items() if _inode(path) == inode]

    def own(self, tensor: Tensor) -> Tensor:
        """A view of a file, read into memory of its own; other tensors as they are, and those of a file that is no
        longer there under its name, where nobody can cut it. Raises Changed for a file that ends too early."""
        import torch

        if not _is_plain(tensor) or (found := self._places.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor
        place, start = found[0], tensor.data_ptr()
        made = torch.empty(1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)),
                           dtype=tensor.dtype)
        if place.own or not place.start <= start <= place.end - made.nbytes:
            return tensor
        view = made.view(torch.uint8).numpy().data.cast("B")
        try:
            opened = open(place.path, "rb", buffering=0)  # noqa: SIM115  # it is closed below
        except OSError:
            return tensor
        with opened as file:
            if os.fstat(file.fileno()).st_ino != place.inode:
                return tensor
            file.seek(place.offset + start - place.start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise Changed(place.path, Text("it ends within a tensor"))
                view = view[count:]
        return made.as_strided(tensor.shape, tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" \
        and tensor.layout == torch.strided and tensor.numel() > 0


def _joined(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Those that go on where the one before ends, in memory and file, as one."""
    last: _Span | None = None
    for span in spans:
        if last and (last.end, last.path, last.inode, last.offset + last.end - last.start) == (
                span.start, span.path, span.inode, span.offset):
            last = last._replace(end=span.end, own=last.own or span.own)
        else:
            if last:
                yield last
            last = span
    if last:
        yield last


def _spans() -> Iterator[_Span]:
    try:
        with open(_PROC, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except OSError:
        return
    found: _Span | None = None
    for line in lines:
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                start, end = (int(text, 16) for text in word.split("-"))
                found = _Span(start, end, int(fields[2], 16), int(fields[4]), fields[5], False)
            else:
                found = None
        elif word == "Anonymous:" and found:
            yield found._replace(own=rest.split()[0] != "0")
            found = None


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0

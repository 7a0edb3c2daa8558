"""Memory-mapped pages of a checkpoint's files, let go once their bytes have been used.

Pages of a file that were read through a mapping count as the process's memory as long as it is mapped, although they
are only the page cache's; and touching one brings in its neighbours, up to 2 MB. Linux alone is asked to let them go.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...containers.safetensors import Header

if TYPE_CHECKING:
    from torch import Tensor


def letting_go(tensors: dict[str, Tensor], headers: list[Header]) -> Callable[[], None]:
    """What takes the pages of these freshly mapped tensors out of the process's memory, whenever it is called.

    Their bytes are read from the file again where they are used again, so nothing may have written to them. It does
    nothing where the tensors are no mappings of the files.
    """
    spans = list(_spans(tensors, headers)) if sys.platform == "linux" else []
    if not spans:
        return lambda: None
    import ctypes

    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def let_go() -> None:
        for start, end in spans:
            madvise(start, end - start, mmap.MADV_DONTNEED)

    return let_go


def _spans(tensors: dict[str, Tensor], headers: list[Header]) -> Iterator[tuple[int, int]]:
    """The whole pages from each file's first tensor to its last, if they are a mapping of that file: what is not
    would be lost."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        maps = [line.rstrip("\n").split(maxsplit=5) for line in file]
    for header in headers:
        own = [tensors[name] for name in header.tensors if name in tensors and tensors[name].nbytes]
        if not own:
            continue
        low, high = min(t.data_ptr() for t in own), max(t.data_ptr() + t.nbytes for t in own)
        path = os.path.realpath(header.path)
        for address, *_, mapped in (fields for fields in maps if len(fields) == 6):
            start, end = (int(text, 16) for text in address.split("-"))
            if start <= low and high <= end and mapped == path:
                yield -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE

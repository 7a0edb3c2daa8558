"""The files behind a MODEL's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .. import host
from ..loaders.files.frozen import Frozen
from ..loaders.files.mapped import Mapped

if TYPE_CHECKING:
    from torch import Tensor


def sources_of(model: Any, tensors: Iterable[Tensor]) -> tuple[Frozen, Mapped]:
    """The files that this pack has loaded a MODEL from, as they were before that, and those that its `tensors` and
    patches are views of otherwise (another loader's, LoRAs), as they are; and what of these is a view. Raises
    CheckpointError for one that has been written to since."""
    mapped = Mapped([*tensors, *_in(list(model.patches.values()))])
    found = Frozen(mapped.files, in_place=True)
    loaded: Frozen | None = model.get_attachment(host.SOURCES)
    found = loaded | found if loaded else found
    found.check()
    return found, mapped


def _in(value: Any) -> Iterator[Tensor]:
    """The tensors of patches: lists of tuples, some with adapters that have theirs in `weights`."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _in(part)
    elif hasattr(value, "weights"):
        yield from _in(value.weights)

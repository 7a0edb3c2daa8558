"""Whole checkpoints: a transformer with its text encoders and its VAE in one file, or in shards of one.

What the parts are called and made of, the host says by the transformer (host/checkpoints.py). The transformer's bytes
are not read; whatever format they are in, names and logical shapes tell the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ... import host
from ...host.texts import Text
from ..architectures.passthrough import logical_shapes
from ..containers.checkpoint import Checkpoint
from ..errors import CheckpointError, MissingFiles
from ..families.names import adopt, whole
from ..files.places import find_path

if TYPE_CHECKING:
    import torch

Made = TypeVar("Made")
APART = Text("use text encoders and VAE from files of their own, or from a base folder")


@dataclass(frozen=True)
class Whole:
    """The files of a whole checkpoint. `shapes` are the transformer's logical ones, by their names in the file;
    `others` everything else, memory-mapped; `parts` the same under the host's names."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    others: dict[str, torch.Tensor]
    parts: host.Parts


def find(reference: str, revision: str = "") -> Path | None:
    """Where a reference is on this disk, or None."""
    try:
        return find_path(reference, revision)
    except MissingFiles:
        return None


def open_whole(checkpoint: Checkpoint) -> Whole | None:
    """The parts of a checkpoint that has more in it than a transformer, else None.

    Raises CheckpointError where the host does not know the transformer, by which the parts go.
    """
    prefix = whole(checkpoint.stored_tensors)
    if not prefix:
        return None
    transformer = Checkpoint(checkpoint.source)
    adopt(transformer)
    named = {transformer.stored(name): shape for name, shape in logical_shapes(transformer.tensors).items()}
    shapes = {name: shape for name, shape in named.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in checkpoint.load_tensors().items() if not name.startswith(prefix)}
    parts = attempt(lambda: host.parts_of(shapes, others, checkpoint.metadata),
                    Text("find the parts of this checkpoint"), checkpoint.source.files[0], APART)
    if parts is None:
        raise CheckpointError(Text("ComfyUI does not know the model in this checkpoint, by which its other parts go"),
                              checkpoint.source.files[0], APART)
    return Whole(checkpoint, shapes, others, parts)


def attempt(work: Callable[[], Made], what: str, where: object, do: str) -> Made:
    """Do something with the host's code for single files, which relies on names and shapes.

    Raises CheckpointError with what it tripped over.
    """
    try:
        return work()
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(Text("ComfyUI cannot {what}: {kind}: {error}", what=what, kind=type(error).__name__,
                                   error=str(error)[:300]), where, do) from error

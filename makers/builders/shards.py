"""Pieces of a model, packed into safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...host.texts import Text
from ...loaders.containers.writing import Layout, Piece, lay_out
from ...loaders.errors import CheckpointError
from ...loaders.words import first_ten


@dataclass(frozen=True)
class Shard:
    """One file: its name, what is in it, and what lies where."""

    name: str
    pieces: list[Piece]
    layout: Layout

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(piece.bytes for piece in self.pieces)


def make_shards(pieces: Sequence[Piece], most: int, stem: str, metadata: Mapping[str, str]) -> list[Shard]:
    """Pieces in their order, packed into files of at most `most` bytes of tensors (more where one piece is larger).

    Raises CheckpointError for no tensors at all, and for those that `lay_out` refuses.
    """
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size and size + piece.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    many = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = many if len(groups) > 1 else [f"{stem}.safetensors"]
    shards = [Shard(name, group, lay_out([tensor for piece in group for tensor in piece.tensors], metadata))
              for name, group in zip(names, groups, strict=True)]
    count = sum(len(shard.layout.tensors) for shard in shards)
    if not count:
        raise CheckpointError(Text("there are no tensors to write"))
    placed = {name for shard in shards for name in shard.layout.tensors}
    if len(placed) < count:
        twice = sorted(name for name in placed if sum(name in shard.layout.tensors for shard in shards) > 1)
        raise CheckpointError(Text("to be written twice: {names}", names=first_ten(twice)))
    return shards

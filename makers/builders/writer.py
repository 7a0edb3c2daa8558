"""Write a model folder tensor by tensor: config.json, safetensors shards and their index, whole or not at all.

Tensors go straight to their place in a shard as they are made (layout.py); publish.py makes a folder of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import host
from ...host.texts import Text
from ...loaders.containers.writing import NotWritten, Piece, difference, write_at, write_piece
from ...loaders.errors import CheckpointError
from ...loaders.files.frozen import Frozen
from ...loaders.files.unfinished import MARKER
from ...loaders.words import first_ten
from ..publish import PART, Step, Work, target_folder, unwritable, work_folder
from .progress import terminal_progress
from .shards import Shard, make_shards

__all__ = ["Written", "terminal_progress", "write_model"]
_JOB = "job.json"


@dataclass(frozen=True)
class Written:
    """What `write_model` wrote: file names, bytes of all tensors, number of shards, bytes taken over of them."""

    files: tuple[str, ...]
    total_size: int
    shards: int
    reused: int


@dataclass
class _Job:
    """What unfinished work was begun for (`sources`: each file read, and its State), and which shards are whole: name
    to (bytes, time of the last change)."""

    fingerprint: str
    layout: str
    sources: list[list[Any]]
    done: dict[str, list[int]] = field(default_factory=dict)


def write_model(target: Path, pieces: Sequence[Piece], *, config: Mapping[str, Any], header: Mapping[str, str],
                copies: Mapping[str, Path], sources: Frozen, shard_bytes: int = 5 << 30,
                stem: str = "diffusion_pytorch_model", index_name: str | None = None, overwrite: bool = False,
                fingerprint: str = "", step: Step | None = None) -> Written:
    """Write the folder `target` from `pieces`, made one at a time and held only until they are written.

    `config` becomes config.json, `header` the metadata of every shard, `copies` (name -> file) are copied beside. The
    files are `<stem>.safetensors`, or shards of at most `shard_bytes` (more where one piece is larger), and always an
    index. `step` is called with bytes of tensors as they are written (default: the node's progress bar and Cancel).

    The folder appears whole or not at all (publish.py). Of an interrupted run with the same `fingerprint` (the
    caller's options), layout and `sources` (every file read, as it was before that), finished shards are taken over;
    the one that was being written is written again. With `overwrite`, the folder of a model that is there stays until
    the new one is whole.

    Raises CheckpointError for a target that may not be used, and, with nothing published: when a tensor is not as
    declared, `make` refuses, a source changes meanwhile (all three also drop the unfinished work), or the disk is full.
    """
    index_name = index_name or f"{stem}.safetensors.index.json"
    shards = make_shards(pieces, shard_bytes, stem, header)
    placed = {name: shard.name for shard in shards for name in shard.layout.tensors}
    total = sum(shard.bytes for shard in shards)
    texts = {"config.json": _json(config),
             index_name: _json({"metadata": {"total_size": total}, "weight_map": placed})}
    names = [*texts, *(shard.name for shard in shards), *copies]
    if len({*names, MARKER}) <= len(names) or any(Path(name).name != name for name in names):
        raise CheckpointError(Text("two files would get one name, or one in another folder: {names}",
                                   names=first_ten(names)), target,
                              Text("rename the file that is copied beside the weights"))
    sources |= Frozen(copies.values())
    target = target_folder(str(target), [*map(Path, sources.states)], overwrite)
    layout = hashlib.sha256(b"".join([*texts.values(), *(shard.layout.head for shard in shards)])).hexdigest()
    job = _Job(fingerprint, layout, [[path, *state] for path, state in sources.states.items()])
    step = step or host.progress(total)
    with work_folder(target, overwrite) as work:
        reused = _take_over(work, job, shards, header)
        _record(work, job)
        work.check_space(sum(shard.layout.bytes for shard in shards) + sum(map(len, texts.values()))
                         + sum(sources.add(path) for path in copies.values()))
        for shard in shards:
            if shard.name in job.done:
                step(shard.bytes)
                continue
            _write_shard(work, shard, sources, step)
            _check(work.content / (shard.name + PART), shard, header)
            _record(work, job, shard)
        for name, text in texts.items():
            _write_file(work.content / name, text)
        with sources.held():
            for name, path in copies.items():
                shutil.copyfile(path, work.content / name)
                _write_file(work.content / name)
        sources.check()
        work.publish([shard.name for shard in shards])
    return Written(tuple(names), total, len(shards), reused)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _take_over(work: Work, job: _Job, shards: list[Shard], header: Mapping[str, str]) -> int:
    """Note in `job.done` which shards an interrupted run has finished, and remove the rest. Returns their bytes."""
    try:
        old = _Job(**json.loads((work.folder / _JOB).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        old = None
    if old is None or (old.fingerprint, old.layout, old.sources) != (job.fingerprint, job.layout, job.sources):
        work.clear()
        return 0
    work.reopen([shard.name for shard in shards])
    for shard in shards:
        part = work.content / (shard.name + PART)
        if part.is_file() and old.done.get(shard.name) == _state(part) and not difference(part, shard.layout, header):
            job.done[shard.name] = old.done[shard.name]
    for path in work.content.iterdir():
        if path.name != MARKER and path.name.removesuffix(PART) not in job.done:
            path.unlink()
    return sum(shard.bytes for shard in shards if shard.name in job.done)


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _record(work: Work, job: _Job, shard: Shard | None = None) -> None:
    """Note that a shard, which is on disk, is finished."""
    if shard:
        job.done[shard.name] = _state(work.content / (shard.name + PART))
    new = work.folder / f"{_JOB}{PART}"
    new.write_text(json.dumps(asdict(job)), encoding="utf-8")
    os.replace(new, work.folder / _JOB)


def _write_shard(work: Work, shard: Shard, sources: Frozen, step: Step) -> None:
    path = work.content / (shard.name + PART)
    with open(path, "wb", buffering=0) as out:
        write_at(out.fileno(), 0, shard.layout.head)
        for piece in shard.pieces:
            _write_piece(out.fileno(), path, shard, piece, work, sources, step)
        os.fsync(out.fileno())


def _write_piece(out: int, path: Path, shard: Shard, piece: Piece, work: Work, sources: Frozen, step: Step) -> None:
    first = piece.tensors[0].name if piece.tensors else ""
    try:
        with sources.held(first):
            write_piece(out, shard.layout, piece, step)
    except NotWritten as error:
        raise unwritable(error.error, path, Text("the tensor {name}", name=error.name)) from error
    except OSError as error:
        raise CheckpointError(Text("cannot read what {name} is made from: {reason}", name=first,
                                   reason=error.strerror or error),
                              error.filename or "", Text("check the files and their rights")) from error
    except CheckpointError:
        work.resumable = False
        raise


def _write_file(path: Path, data: bytes | None = None) -> None:
    """Write `data`, if given, and have the file on disk."""
    with open(path, "r+b" if data is None else "wb") as file:
        file.write(data or b"")
        file.flush()
        os.fsync(file.fileno())


def _check(path: Path, shard: Shard, header: Mapping[str, str]) -> None:
    wrong = difference(path, shard.layout, header)
    if wrong:
        raise CheckpointError(Text("what was written does not read back: {problem}", problem=wrong), path,
                              Text("check the disk, then run this again"))

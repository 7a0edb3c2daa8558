"""What happens to a changed checkpoint: described and loaded as nodes do it, in a process of its own that may end."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz.ops import OF_BYTES, PLAIN, Op, apply, entries_of
from fuzz.seeds import SEEDS, Seed
from safetensors import safe_open

SECONDS = 2.0  # of processor time, for a description and for a load
PATIENCE = 60  # seconds until a process is ended that says nothing
MEMORY = 200_000_000  # bytes more than before
AT_ONCE = 400  # until a process is replaced: loaded models leave things behind
SENTENCE = 6000  # characters of a refusal


class Outcome(NamedTuple):
    """`kind`: refused, same, bytes (other numbers, as bytes of tensors are others), or what must not be: other (numbers),
    NaN (by a scale), raised, slow, memory, died, wordy."""

    kind: str
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0

    @property
    def wrong(self) -> bool:
        """Whether this must not be."""
        return self.kind not in ("refused", "same", "bytes")


def _peak() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


class _Measured:
    """Processor time and memory of a block. The peak is reset where Linux lets us."""

    def __enter__(self) -> _Measured:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        self._memory, self._begun = _peak(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.memory = time.process_time() - self._begun, _peak() - self._memory


def look(path: Path, seed: Seed | None, truth: Any) -> Outcome:
    """Describe, load and run what is at `path`; `truth` is what the seed itself gives. Without a seed it is described."""
    from quantized_transformers.loaders.errors import CheckpointError
    from quantized_transformers.loaders.queries import Query
    from quantized_transformers.views.card import card

    worst = Outcome("refused")

    def measured(run: Callable[[], Any]) -> Any:
        nonlocal worst
        timed = _Measured()
        try:
            with timed:
                return run()
        finally:
            worst = worst._replace(seconds=max(worst.seconds, timed.seconds), memory=max(worst.memory, timed.memory))

    found, why = None, ""
    try:
        measured(lambda: card(Query(str(path), node=seed.node if seed else "QT_LoadBaseModel", layers=True)))
    except CheckpointError as error:
        why = str(error)
    except BaseException as error:
        return Outcome("raised", f"describing: {type(error).__name__}\n{traceback.format_exc(limit=-6)}")
    try:
        found = measured(lambda: seed.run(path)) if seed else None
    except CheckpointError as error:
        why = str(error)
    except BaseException as error:
        return Outcome("raised", f"loading: {type(error).__name__}\n{traceback.format_exc(limit=-8)}")
    if worst.seconds > SECONDS:
        return worst._replace(kind="slow", detail=why)
    if worst.memory > MEMORY:
        return worst._replace(kind="memory", detail=why)
    if found is None:
        return worst._replace(kind="wordy" if len(why) > SENTENCE else "refused", detail=why)
    return worst._replace(kind="same" if torch.equal(found, truth) else "other" if bool(found.isfinite().all()) else "NaN")


def told(folder: Path) -> dict[str, Any]:
    """All that files say but the bytes of their tensors; empty where that cannot be read."""
    from quantized_transformers.loaders.containers.checkpoint import read_header
    from quantized_transformers.loaders.errors import CheckpointError

    try:
        headers = {path.name: read_header(str(path)) for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")}
    except CheckpointError:
        return {}
    return {name: (header.tensors, header.metadata) for name, header in headers.items()} | {
        path.name: path.read_bytes() for path in folder.rglob("*.json") if path.is_file()}


def _work(connection: Any, truths: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        name, path = connection.recv()
        connection.send(look(Path(path), SEEDS.get(name), truths.get(name)))


class Judge:
    """Changes copies of the seeds and says what comes of it. `folder` should be in memory."""

    def __init__(self, folder: Path, names: Iterable[str] = tuple(SEEDS)) -> None:
        self._folder, self._asked, self._process = folder, 0, None
        torch.set_num_threads(1)  # sums of several threads are not the same twice
        self.seeds: dict[str, Path] = {}  # the folder of each
        self._truths: dict[str, Any] = {}
        self._inside: dict[str, str] = {}
        for name in names:
            made = folder / "seeds" / name.replace(" ", "_")
            made.mkdir(parents=True)
            path = SEEDS[name].make(made)
            self.seeds[name], self._inside[name] = made, path.relative_to(made).as_posix()
            self._truths[name] = SEEDS[name].run(path)

    def __call__(self, name: str, ops: Iterable[Op]) -> Outcome:
        """What comes of these changes to a seed.

        Other numbers are to be expected where the bytes of tensors are others, and the other changes alone make no
        difference; NaN is not by those of a scale.
        """
        ops = tuple(ops)
        outcome = self._ask(name, ops)
        unseen = [op for op in ops if op.what in OF_BYTES or self._relabelled(name, op)]
        if outcome.kind in ("other", "NaN") and unseen:
            rest = tuple(op for op in ops if op not in unseen)
            of_scale = outcome.kind == "NaN" and any(op.what == "poison" and self._no_number(name, op) for op in ops)
            if self._ask(name, rest).kind == "same" and not of_scale \
                    and self._told(name, tuple(op for op in ops if op.what == "put")):
                return outcome._replace(kind="bytes")
        return outcome

    def _no_number(self, name: str, op: Op) -> bool:
        """Whether a scale holds NaN or infinity after this change."""
        tensor = entries_of(self.seeds[name] / op.file)[op.at[0]][0]
        if tensor.rpartition(".")[2] in PLAIN:
            return False
        with safe_open(self._changed(name, [op]) / op.file, framework="pt") as file:
            found = file.get_tensor(tensor)
        return found.is_floating_point() and not bool(found.float().isfinite().all())

    def _relabelled(self, name: str, op: Op) -> bool:
        """Whether F16 became BF16, or the other way round: as likely numbers, only others."""
        twins = ("F16", "BF16")
        return op.what == "dtype" and op.value in twins and entries_of(self.seeds[name] / op.file)[op.at][1]["dtype"] in twins

    def _told(self, name: str, ops: tuple[Op, ...]) -> bool:
        """Whether the files still say the same of their tensors."""
        return not ops or told(self._changed(name, ops)) == told(self.seeds[name])

    def _changed(self, name: str, ops: Iterable[Op]) -> Path:
        case = self._folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.seeds[name], case)
        for op in ops:
            apply(op, case)
        return case

    def _ask(self, name: str, ops: Iterable[Op]) -> Outcome:
        return self._answer(name, self._changed(name, ops) / self._inside[name])

    def describe(self, path: Path) -> Outcome:
        """What comes of a description alone: "refused", also where there was nothing to refuse."""
        return self._answer("", path)

    def _answer(self, name: str, path: Path) -> Outcome:
        if self._asked >= AT_ONCE or self._process is None:
            self.close()
            here, there = multiprocessing.get_context("fork").Pipe()
            self._process = multiprocessing.get_context("fork").Process(target=_work, args=(there, self._truths), daemon=True)
            self._process.start()
            there.close()
            self._connection, self._asked = here, 0
        self._asked += 1
        begun = time.monotonic()
        try:
            self._connection.send((name, str(path)))
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
            self.close()
            return Outcome("slow", f"no answer in {PATIENCE} s", time.monotonic() - begun)
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            return Outcome("died", f"the process ended ({code})")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None




"""What `python3 dev.py bench` is made of: arms in turns, rows with a budget, the gate, tables.

A part is a module with `TITLE`, `cases` (what to measure, its files made in a folder) and `measure` (in a process of its
own, for one case: rows). Whatever is compared runs in one process on one thread, each arm once a round, the other way
round every second time, and counts by the median of its processor time: other work on the machine moves times, and
ratios hardly. A budget is held against the median of three such processes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]
RUNS = 3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Large tensors come from the system and go back to it, as in a process that loads once: what one arm has let go is no
# memory that the next one gets for nothing.
FRESH_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


class Row(NamedTuple):
    """One measured ratio; absolute, in a unit, only where there is nothing to divide by."""

    name: str
    value: float
    budget: float | None = None  # at most
    beside: Mapping[str, float] = {}  # the same of what others do: "stock", "gguf-py"
    unit: str = "x"


class Result(NamedTuple):
    """A row's median over all runs, with the least and the most."""

    row: Row
    least: float
    most: float

    @property
    def over(self) -> bool:
        return self.row.budget is not None and not self.row.value <= self.row.budget


def spent(arms: Mapping[str, Callable[[], Any]], times: int = 7, before: Callable[[str], Any] = lambda name: gc.collect(),
          clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Median processor seconds of each arm, over so many rounds after a first one that does not count. `before`, which is told
    the arm, and letting go of what an arm returns are no part of its time; Python's garbage waits."""
    gc.collect()
    gc.freeze()  # what modules keep for good would take each collection longer than most arms
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(times + 1):
        for name in reversed(arms) if i % 2 else arms:  # type: ignore[call-overload]
            before(name)
            gc.disable()
            start = clock()
            made = arms[name]()
            took = clock() - start
            gc.enable()
            del made
            if i:
                found[name].append(took)
    gc.unfreeze()
    return {name: median(took) for name, took in found.items()}


def child(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """What a module's function returns, as JSON has it, in a fresh process on one thread. Raises RuntimeError with what
    that one said when it fails."""
    given = json.dumps([str(part) if isinstance(part, Path) else part for part in arguments])
    done = subprocess.run([sys.executable, "-m", "support.bench", function.__module__, function.__name__, given], cwd=TESTS,
                          capture_output=True, text=True, check=False, env={**os.environ, **ONE_THREAD, **environment})
    if done.returncode:
        raise RuntimeError(f"{function.__module__}.{function.__name__}{given}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(part: Any, folder: Path, runs: int = RUNS) -> list[Result]:
    """All rows of a part, each by the median of so many runs."""
    cases = part.cases(folder)
    return gate([[Row(*row) for case in cases for row in child(part.measure, *case, **getattr(part, "ENVIRONMENT", {}))]
                 for _ in range(runs)])


def gate(runs: Iterable[list[Row]]) -> list[Result]:
    """Rows of the same names from several runs -> their medians, which are what a budget is for. Raises ValueError when the
    runs do not have the same rows."""
    results = []
    for rows in zip(*runs, strict=True):
        first = rows[0]
        if any((row.name, row.budget, row.unit, sorted(row.beside)) != (first.name, first.budget, first.unit, sorted(first.beside))
               for row in rows):
            raise ValueError(f"the runs differ in more than their numbers: {rows}")
        values = [row.value for row in rows]
        beside = {who: median(row.beside[who] for row in rows) for who in first.beside}
        results.append(Result(first._replace(value=median(values), beside=beside), min(values), max(values)))
    return results


def number(value: float, unit: str = "x") -> str:
    """Three digits, without a unit for a ratio."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text if unit == "x" else f"{text} {unit}"


def table(results: list[Result]) -> str:
    """Rows for a terminal, those beyond their budget marked."""
    others = list(dict.fromkeys(who for result in results for who in result.row.beside))
    width = max((len(result.row.name) for result in results), default=0) + 2
    lines = [f"        {'':{width}}{'ours':>9}{'budget':>9}" + "".join(f"{who:>9}" for who in others) + "   three runs"]
    for result in results:
        row = result.row
        mark = "OVER" if result.over else "ok  " if row.budget is not None else "    "
        cells = [number(row.value, row.unit), "" if row.budget is None else f"{row.budget:g}",
                 *(number(row.beside[who]) if who in row.beside else "" for who in others)]
        lines.append(f"  {mark}  {row.name:{width}}" + "".join(f"{cell:>9}" for cell in cells)
                     + f"   {number(result.least)} .. {number(result.most)}")
    return "\n".join(lines)


def main() -> None:
    module, function, arguments = sys.argv[1:]
    from support.pack import start_comfy

    start_comfy()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(arguments))))


if __name__ == "__main__":
    main()

"""A file of JSON lines, one a measurement, flushed as they come: what was measured stays, whatever comes after it."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SPOILED = 3  # exit code of a process whose CUDA context an error has spoiled: the rest needs a new one


class Rows:
    """The rows of one stage. A row has "stage", "key" and what was measured, or "error".

    Before it is measured, a line with "begin" says so: a process that dies leaves the name of what killed it.
    `skip_done` leaves out what the file has already, errors among it.
    """

    def __init__(self, path: Path, stage: int, skip_done: bool = False) -> None:
        self.path, self.stage = path, stage
        self.before = list(read(path)) if path.is_file() else []
        self.done = {row["key"] for row in self.before if row["stage"] == stage and "begin" not in row} if skip_done \
            else set()

    def write(self, key: str, **found: Any) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "key": key, **found}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measure(self, key: str, work: Callable[[], dict[str, Any]]) -> None:
        """Append the row that `work` returns, or what it raised. Exits with SPOILED after a CUDA error."""
        if key in self.done:
            return
        self.write(key, begin=True)
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # the next row is another matter
            text = str(error) or type(error).__name__
            print(f"  {key}: FAILED: {text.splitlines()[0][:400]}", flush=True)
            self.write(key, error=text.splitlines()[0][:400], trace=traceback.format_exc()[-1500:])
            if "CUDA error" in text or "illegal memory access" in text:
                os._exit(SPOILED)
            return
        self.write(key, **found, took=round(time.perf_counter() - start, 2))
        print(f"  {key}: {said(found)}", flush=True)

    def failed(self, arm: str) -> str:
        """Why an arm may not be timed: what stage 2 found wrong with it; empty where it passed or was not run."""
        wrong = [row for row in self.before if row["stage"] == 2 and row.get("arm", row["key"]) == arm
                 and "begin" not in row and not row.get("ok", False)]
        return str(wrong[0].get("error") or f"wrong numbers at {wrong[0]['key']}") if wrong else ""


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, without a last line that was cut off; for one key of a stage the last that is there."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        key = (row["stage"], row["key"])
        if "begin" not in row or key not in found:
            found[key] = row
    return iter(found.values())


def said(found: dict[str, Any]) -> str:
    """A row in one line."""
    def word(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(f"{name} {word(value)}" for name, value in found.items() if not isinstance(value, list | dict))

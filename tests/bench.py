"""Ratios and budgets: `python3 dev.py bench [--only PART ...] [--record [NOTE]]`. Exits with 1 when a budget is broken.

support/bench.py says how everything is measured, support/bench_<part>.py what; docs/bench.md has what was recorded.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import bench, bench_history
from support.pack import start_comfy

PARTS = {name: f"support.bench_{name}" for name in ("import", "inspect", "lists", "load", "svdq", "formats", "calls", "linear",
                                                    "lora", "patches", "build")}


def main(arguments: list[str] | None = None, parts: Mapping[str, str] = PARTS, page: Path = bench_history.PAGE,
         runs: int = bench.RUNS) -> int:
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*parts], metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--record", nargs="?", const="", metavar="NOTE", help="add the run to docs/bench.md, with a note")
    options = parser.parse_args(arguments)
    if options.record is not None and options.only:
        parser.error("a record is of all parts: --record goes without --only")
    start_comfy()
    found: dict[str, list[bench.Result]] = {}
    for name in options.only or parts:
        part, start = importlib.import_module(parts[name]), time.monotonic()
        print(f"{name}: {part.TITLE}", flush=True)
        if sys.platform != "linux" and getattr(part, "LINUX", False):
            print("  left out: it reads /proc")
            continue
        with tempfile.TemporaryDirectory(prefix="qt-bench-") as folder:
            found[name] = bench.run(part, Path(folder), runs)
        load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        print(f"{bench.table(found[name])}\n  ({time.monotonic() - start:.0f} s{load})\n", flush=True)
    over = [f"{name}: {result.row.name}" for name, results in found.items() for result in results if result.over]
    if options.record is not None:
        bench_history.append(page, found, bench_history.about(options.record))
        print(f"recorded in {page}")
    print("all within budget" if not over else "\n".join(("over budget:", *over)))
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())

"""What every format does on this GPU: `python3 dev.py gpu-table --stage 0 1 2 3 [--cpu --tiny] [--skip-done]`.

Each stage runs in processes of its own, and a row that kills its process is noted and left behind, so that no failure
takes others along. Rows go to a file of JSON lines as they are measured (docs/gpu.md says what they mean);
`python3 dev.py gpu-report` makes the table of docs/performance.md of them. Nothing is timed that stage 2 found wrong.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import machine
from gpu.rows import Rows, read

STAGES = {0: "versions", 1: "ceilings", 2: "correctness", 3: "layer_times", 4: "whole_steps", 5: "small_and_compiled",
          6: "loras", 7: "memory", 8: "profiles", 9: "other_models", 10: "through_nodes", 11: "offload", 12: "offload",
          13: "offload", 14: "kept"}
SWITCHES = {12: ["--disable-dynamic-vram"], 13: ["--disable-pinned-memory"], 14: ["--disable-dynamic-vram"]}  # of ComfyUI, for a stage
AGAIN = 12  # new processes for a stage whose rows kill theirs


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py gpu-table", description=__doc__)
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--out", type=Path, default=Path("gpu-table.jsonl"), help="file that rows are added to")
    parser.add_argument("--cpu", action="store_true", help="on the CPU: only to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="tiny layers and models")
    parser.add_argument("--skip-done", action="store_true", help="leave out rows that the file has")
    parser.add_argument("--limit", type=float, default=600, help="seconds for everything")
    parser.add_argument("--switch", action="append", default=[], help="of ComfyUI, for every stage: --switch=--disable-"
                        "dynamic-vram where that crashes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of a stage
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.one:
        return one(options)
    end, failed = time.monotonic() + options.limit, False
    if 0 in options.stage and not options.tiny:
        if not in_processes(options, [0], end):
            print("nothing else makes sense here, so nothing else is tried")
            return 1
        options.stage.remove(0)
    # what a stage leaves behind on a GPU is gone with its process; tiny ones share one, whose start takes the longest
    shared = [stage for stage in options.stage if stage not in SWITCHES] if options.tiny else []
    for stages in [*([shared] if shared else []), *([stage] for stage in options.stage if stage not in shared)]:
        failed |= not in_processes(options, stages, end)
    return int(failed)


def one(options: argparse.Namespace) -> int:
    """Stages, in this process."""
    import torch

    if not options.cpu and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --cpu --tiny shows that the stages run")
    where = machine.start(options.cpu, options.tiny, *SWITCHES.get(options.stage[0], []), *options.switch)
    for stage in options.stage:
        start = time.monotonic()
        print(f"stage {stage}: {STAGES[stage].replace('_', ' ')}", flush=True)
        with torch.inference_mode():  # as the server runs its nodes
            of(stage).run(Rows(options.out, stage, options.skip_done), where)
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
    return 0


def of(stage: int) -> Any:
    """The module of a stage: its `run` and its LIMIT in seconds."""
    return importlib.import_module(f"gpu.{STAGES[stage]}")


def in_processes(options: argparse.Namespace, stages: list[int], end: float) -> bool:
    """Stages in new processes until they have come to their end; whether they did, and every row of them is right."""
    passed_on = ["--stage", *map(str, stages), "--out", str(options.out), "--one", *(["--cpu"] if options.cpu else []),
                 *(["--tiny"] if options.tiny else []), *(f"--switch={switch}" for switch in options.switch)]
    stop, skip = min(end, time.monotonic() + sum(of(stage).LIMIT for stage in stages)), options.skip_done
    before = -1
    for _ in range(AGAIN):
        command = [sys.executable, __file__, *passed_on, *(["--skip-done"] if skip else [])]
        try:
            code: int | str = subprocess.run(command, timeout=max(1.0, stop - time.monotonic()), check=False).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        rows = [row for row in read(options.out) if row["stage"] in stages] if options.out.is_file() else []
        unfinished = [row for row in rows if "begin" in row]
        for row in unfinished:  # it took its process along
            Rows(options.out, row["stage"]).write(row["key"], error=f"the process ended with {code}")
        if not code:
            return all("error" not in row and row.get("ok", True) for row in rows)
        print(f"  ended with {code}{': ' if unfinished else ''}{', '.join(row['key'] for row in unfinished)}", flush=True)
        if code == "out of time" or len(rows) == before:  # nothing was gained
            return False
        skip, before = True, len(rows)
    return False


if __name__ == "__main__":
    sys.exit(main())

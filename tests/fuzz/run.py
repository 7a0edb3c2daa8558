"""Many examples, for as long as one likes: `python3 dev.py fuzz --minutes N` (also: --examples N, --seed N, NAME ...)."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.pack import start_comfy  # noqa: E402

start_comfy()

from fuzz.drawing import changes  # noqa: E402
from fuzz.judge import Judge, Outcome  # noqa: E402
from fuzz.seeds import SEEDS  # noqa: E402


def memory() -> Path:
    """A folder in memory where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="qt-fuzz-", dir=shared if shared.is_dir() else None))


def main() -> int:
    """0 when nothing is wrong. Prints every kind of wrong outcome once, with the changes that led to it."""
    parser = argparse.ArgumentParser(prog="dev.py fuzz")
    parser.add_argument("names", nargs="*", help=f"seeds, of: {', '.join(SEEDS)}")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--examples", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    names, folder = chosen.names or list(SEEDS), memory()
    until = time.monotonic() + 60 * chosen.minutes if chosen.minutes else float("inf")
    most = chosen.examples or (10 ** 9 if chosen.minutes else 1000)
    seen: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    worst: dict[str, Any] = {"seconds": 0.0, "memory": 0}
    done, number = 0, chosen.seed
    try:
        judge = Judge(folder, names)
        begun = time.monotonic()
        while done < most and time.monotonic() < until:
            @hypothesis.seed(number)
            @settings(max_examples=min(200, most - done), deadline=None, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(st.data())
            def draw(data: Any) -> None:
                nonlocal done
                if time.monotonic() > until:
                    return
                name = data.draw(st.sampled_from(names))
                ops = data.draw(changes(judge.seeds[name]))
                outcome: Outcome = judge(name, ops)
                done += 1
                seen[outcome.kind] += 1
                worst["seconds"] = max(worst["seconds"], outcome.seconds)
                worst["memory"] = max(worst["memory"], outcome.memory)
                if outcome.wrong:
                    place = outcome.detail.strip().splitlines()[-1:] + outcome.detail.strip().splitlines()[-3:-2]
                    key = f"{outcome.kind} {' '.join(place)[:200] or [op.what for op in ops]}"
                    if key not in wrong:
                        wrong[key] = f"{name!r}, {ops!r}"[:600]
                        print(f"\n*** {outcome.kind} {outcome.seconds:.1f} s {outcome.memory / 1e6:.0f} MB: {name!r}, "
                              f"{repr(ops)[:600]}\n{outcome.detail[-1500:]}", flush=True)

            draw()
            number += 1
        judge.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{done} examples in {time.monotonic() - begun:.0f} s, seeds {chosen.seed} to {number - 1}: {dict(seen)}; "
          f"the slowest {worst['seconds']:.2f} s, the largest {worst['memory'] / 1e6:.0f} MB; "
          f"{len(wrong)} kinds of what must not be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

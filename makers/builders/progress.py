"""A progress bar for the command line."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta

from ...host.texts import Text, said
from ...loaders.words import size
from ..publish import Step

_WINDOW = 10.0  # seconds that the rate is taken over
_WIDTH = 24


def terminal_progress(total: int) -> Step:
    """A function to call with numbers of bytes done: shows the share of `total`, the rate and the time left on stderr.

    One line that is written over, at most ten times a second; where stderr is no terminal, a line for each 5 %.
    """
    terminal = sys.stderr.isatty()
    start = time.monotonic()
    seen: deque[tuple[float, int]] = deque([(start, 0)])
    done, shown, last = 0, 0, start - 1

    def step(count: int) -> None:
        nonlocal done, shown, last
        done += count
        now = time.monotonic()
        seen.append((now, done))
        while len(seen) > 2 and now - seen[0][0] > _WINDOW:
            seen.popleft()
        part = int(20 * done / total) if total else 20
        if (now - last < 0.1 and done < total) if terminal else part == shown:
            return
        shown, last = part, now
        (before, first), share = seen[0], done / total if total else 1.0
        rate = (done - first) / max(now - before, 1e-3)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
        bar = f"[{'#' * int(_WIDTH * share):{_WIDTH}}] {100 * share:3.0f} %"
        line = Text("{bar}  {done} of {total}  {rate}/s  {left} left", bar=bar, done=size(done), total=size(total),
                    rate=size(int(rate)), left=left) if done < total else \
            Text("{bar}  {done} of {total}  {rate}/s  in {seconds:.0f} s", bar=bar, done=size(done), total=size(total),
                 rate=size(int(rate)), seconds=now - start)
        # the cursor waits at the start of the line, for a message that breaks the run off
        print(f"\r{said(line):79}" if terminal else said(line), end="\r" if terminal and done < total else "\n",
              file=sys.stderr, flush=True)

    return step

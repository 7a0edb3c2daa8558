"""Anonymous memory of this process (Linux), and the most of it while something runs."""

from __future__ import annotations

import threading
import time


def anon() -> int:
    """RssAnon in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """`with Peak() as peak:` looks every other millisecond; then `peak.more` are the bytes beyond those before, at most."""

    def __enter__(self) -> Peak:
        self.before = self.most = anon()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.most = max(self.most, anon())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.most = max(self.most, anon())

    @property
    def more(self) -> int:
        return self.most - self.before

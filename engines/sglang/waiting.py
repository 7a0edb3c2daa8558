"""Waiting for a server: Cancel is heard at once, and a node says what it waits for and for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from ... import host
from ...host.texts import Text, said
from ...loaders.errors import CheckpointError
from . import client
from .address import Address

STEP = 0.2  # seconds between two looks at Cancel
T = TypeVar("T")


class Wait:
    """One picture or video of a server: at most `seconds` from now, with what comes before it in its queue."""

    def __init__(self, address: Address, seconds: float, shown: host.Waiting) -> None:
        self.address, self.shown, self.start = address, shown, time.monotonic()
        self.end, self.limit = self.start + seconds, seconds
        self.drawing = ""  # what goes on at the server when nobody waits for it any more

    @property
    def patience(self) -> float:
        """Seconds for a question that `until` watches, and ends first."""
        return max(self.end - time.monotonic(), 0) + 10

    def look(self, what: str) -> None:
        """Say what is waited for. Raises the host's interruption after Cancel, CheckpointError after the limit."""
        if self.shown.cancelled():
            if self.drawing:
                self.shown.say(said(self.drawing))
            self.shown.stop()
        passed = time.monotonic() - self.start
        if passed > self.limit:
            raise CheckpointError(Text("this took longer than {seconds:g} s: {what}", seconds=self.limit, what=what),
                                  self.address.url, Text("raise timeout, or look at the server's log; {goes_on}",
                                                         goes_on=self.drawing or Text("nothing was drawn")))
        self.shown.say(said(Text("{what} ({seconds:.0f} s)", what=what, seconds=passed)))

    async def until(self, work: Awaitable[T], what: str) -> T:
        """The result of `work`, which is given up when this is cancelled or takes too long."""
        task, said_at = asyncio.ensure_future(work), -1
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=STEP)
                if done:
                    return task.result()
                if self.shown.cancelled() or int(time.monotonic() - self.start) > said_at:
                    said_at = int(time.monotonic() - self.start)
                    self.look(what)
        except asyncio.CancelledError:  # another node of the graph failed, or heard Cancel first
            if self.drawing:
                self.shown.say(said(self.drawing))
            raise
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def healthy(self) -> None:
        """Wait while the server warms up. Raises CheckpointError where it is not one, or cannot draw."""
        while True:
            warming, problem = await self.until(client.health(self.address), Text("asks the server how it is"))
            if not problem:
                return
            if not warming:
                raise CheckpointError(problem, self.address.url, Text("look at its log"))
            await self.until(asyncio.sleep(1), problem)

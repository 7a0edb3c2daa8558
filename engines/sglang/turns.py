"""Nodes of this ComfyUI that want other LoRAs of one server take turns: at once they would undo each other's. Those
that want the same ones go together, for a server may have copies of its model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from ...host.texts import Text
from .loras import LoRA
from .waiting import Wait


class _Turn:
    """Of one server: what those who have it want, and how many they are."""

    def __init__(self) -> None:
        self.loras: tuple[LoRA, ...] = ()
        self.users = 0
        self.over = asyncio.Condition()

    async def take(self, loras: tuple[LoRA, ...]) -> None:
        async with self.over:
            await self.over.wait_for(lambda: not self.users or self.loras == loras)
            self.users, self.loras = self.users + 1, loras

    async def give_back(self) -> None:
        async with self.over:
            self.users -= 1
            self.over.notify_all()


# ComfyUI runs each prompt in a loop of its own, and no two at once.
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Turn]] = WeakKeyDictionary()


@asynccontextmanager
async def turn(wait: Wait, loras: tuple[LoRA, ...]) -> AsyncIterator[None]:
    """Hold a server for these LoRAs. Raises what `wait.until` does."""
    mine = _turns.setdefault(asyncio.get_running_loop(), {}).setdefault(wait.address.url, _Turn())
    await wait.until(mine.take(loras), Text("waits for another node that wants other LoRAs of this server"))
    try:
        yield
    finally:
        await mine.give_back()

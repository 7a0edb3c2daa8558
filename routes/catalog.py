"""The catalog route: answers soon with what is described by then; the rest is described behind it, one after the other,
by the same helper that requests use, so that a badge never waits for more than one of them."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from ..loaders.errors import CheckpointError, OtherKind
from ..views import catalog
from ..views.card import judged
from ..views.helper import Helper, HelperError
from .work import Answer, Pool, answer

PATIENCE = 0.3  # seconds that a request waits for the rest
EVERY = 2.0  # seconds between looking at all files again
Card = dict[str, Any] | CheckpointError


class CatalogView:
    """The catalog of this server. The helper keeps cards while no file changes, so looking again costs little."""

    def __init__(self, pool: Pool, helper: Helper) -> None:
        self._pool, self._helper = pool, helper
        self._entries: list[catalog.Entry] = []
        self._cards: dict[catalog.Entry, Card] = {}
        self._task: asyncio.Task[None] | None = None
        self._looked = -EVERY

    async def answer(self) -> Answer:
        """The catalog as far as it is known. Raises HelperError when the folders cannot be listed."""
        if self._task is None or self._task.done() and time.monotonic() - self._looked > EVERY:
            self._task = asyncio.get_running_loop().create_task(self._look())
        await asyncio.wait({self._task}, timeout=PATIENCE)
        if self._task.done() and not self._task.cancelled():
            self._task.result()
        entries, cards = list(self._entries), dict(self._cards)
        pending = not self._task.done() and len(cards) < max(len(entries), 1)
        return await asyncio.to_thread(_answer, entries, cards, pending)  # beside the thread that waits for the helper

    async def _look(self) -> None:
        """List the entries and describe each."""
        self._entries = await asyncio.to_thread(catalog.entries)  # of the scan that the nodes' lists are of
        there = set(self._entries)
        self._cards = {entry: card for entry, card in self._cards.items() if entry in there}
        for entry in self._entries:
            self._cards[entry] = await self._pool.run(("item", entry), partial(self._card, entry))
        self._looked = time.monotonic()

    def _card(self, entry: catalog.Entry) -> Card:
        try:
            return judged(self._helper.ask("describe", vars(entry.query)))
        except HelperError as error:
            made = OtherKind if error.kind == "other kind" else CheckpointError
            return made(error.what, error.where, error.do)


def _answer(entries: list[catalog.Entry], cards: dict[catalog.Entry, Card], pending: bool) -> Answer:
    return answer(catalog.listing((catalog.item(entry, cards.get(entry)) for entry in entries), pending))

"""Work beside the event loop: responses, threads, and requests for the same thing that share one run."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..host.texts import ENGLISH, Text, each, one_line, said, spoken
from ..loaders.errors import CheckpointError
from ..views.helper import HelperError

STATUS = {"bad": 400, "failed": 400, "other kind": 400, "outside": 403, "missing": 404, "too large": 413}
WAITING = 512
logger = logging.getLogger(__name__)
T = TypeVar("T")


class BusyError(Exception):
    """Too many requests are waiting."""


class Answer(NamedTuple):
    """A response: status and JSON, made in a thread so that the event loop has nothing to encode."""

    status: int
    body: bytes


def answer(value: Any, status: int = 200) -> Answer:
    """A value as a response, in the language of whoever asks."""
    return Answer(status, json.dumps(value if spoken() == ENGLISH else each(value, said)).encode("ascii"))


def error_value(what: str, where: str = "", do: str = "") -> dict[str, str]:
    """An error as JSON; every text becomes one line."""
    return {"error": one_line(what), "where": one_line(where), "todo": one_line(do)}


def refusal(status: int, what: str, where: str = "", do: str = "") -> Answer:
    """An error as a response."""
    return answer(error_value(what, where, do), status)


def guarded(work: Callable[[], Answer]) -> Answer:
    """Run `work`; whatever goes wrong is an answer, too."""
    try:
        return work()
    except HelperError as error:
        return refusal(STATUS[error.kind], error.what, error.where, error.do)
    except CheckpointError as error:
        return refusal(400, error.what, error.where, error.do)
    except Exception as error:
        logger.exception("Quantized Transformers: a request failed")
        return refusal(400, Text("this request fails in this version: {kind}", kind=type(error).__name__), "",
                       Text("report it, with ComfyUI's log"))


class Pool:
    """Runs functions in so many threads, for the one that asks. Methods are for the event loop only."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, name)
        self._running: dict[Hashable, asyncio.Future[Any]] = {}

    async def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns, shared with every other caller of the same language and key that waits for it.

        Raises BusyError when WAITING others are waiting.
        """
        key = spoken(), key
        future = self._running.get(key)
        if future is None:
            if len(self._running) >= WAITING:
                raise BusyError
            future = asyncio.get_running_loop().run_in_executor(self._threads, partial(copy_context().run, work))
            self._running[key] = future
            future.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(future)  # one client that goes away does not take the answer from the others

"""The bytes of one file from a hub: on from where they stopped, and from their start where the other side cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from ....host.texts import Text
from ..hub_file import HashedFile, RemoteFile
from .http import LEAST, Answer, BrokenError, RefusedError, begins, pause

TRIES = 5  # in a row that bring next to nothing
_PAUSE = 1.0  # seconds before the next


def transfer(ask: Callable[[int], AbstractContextManager[Answer]], file: RemoteFile, target: HashedFile) -> None:
    """Write what `target` has not yet of a file; `ask(start)` asks for its bytes from there.

    No more than its listed size is taken, whatever is sent. Raises the failures of http.py.
    """
    tries = TRIES
    while (start := target.tell()) < file.size:
        problem: OSError = BrokenError(Text("it ended after {arrived:,} of {all:,} bytes", arrived=start,
                                            all=file.size))
        try:
            with ask(start) as answer:
                if begins(answer, start) != start:
                    target.truncate(0)
                for block in answer.blocks(file.size - target.tell()):
                    target.write(block)
        except BrokenError as error:
            problem = error
        except RefusedError as error:
            if not error.busy:
                raise
            problem = error
        if target.tell() >= file.size:
            return
        tries = TRIES if target.tell() - start >= LEAST else tries - 1
        if not tries:
            raise problem
        pause(_PAUSE, target.step)

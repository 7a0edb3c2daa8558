"""What the web routes ask of files, answered in a process of its own.

Parsing holds Python's interpreter lock, and what is parsed here was written by others; a server that does it in a
thread stops answering meanwhile. This process needs neither torch nor ComfyUI, but for models that only ComfyUI knows:
for the first of those it starts one, on the CPU. It speaks JSON, one object a line: requests on stdin, answers on
stdout. It ends when stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import host
from ..host.texts import Text, packed
from ..loaders.errors import CheckpointError, MissingFiles, OtherKind
from ..loaders.queries import Query
from ..views.card import card
from ..views.confine import OutsideError, TooLargeError, confined

KEPT = 512  # cards of the last different questions
KINDS = ((OutsideError, "outside"), (TooLargeError, "too large"), (MissingFiles, "missing"), (OtherKind, "other kind"),
         (CheckpointError, "bad"))
logger = logging.getLogger(__name__)


class Answers:
    """The questions; "nothing" only finds out that it runs. Cards and refusals are kept while no file behind them
    changes."""

    def __init__(self) -> None:
        self._cards: OrderedDict[tuple[Query, str], dict[str, Any] | CheckpointError] = OrderedDict()
        self._ask: dict[str, Callable[[Any], Any]] = {
            "describe": self.describe, "migrate": self.migrate, "serve": self.serve, "nothing": lambda _: None}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"ask": question, "of": what it is about, "folders", "texts", "capability"} -> {"answer"}, or {"error",
        "what", "where", "do"} where "error" is one of KINDS or "failed". Sentences are packed (host/texts.py)."""
        host.act_for(request["folders"], request["texts"],
                     tuple(request["capability"]) if request["capability"] else None)
        try:
            return {"answer": packed(self._ask[request["ask"]](request["of"]))}
        except CheckpointError as error:
            kind = next(name for kind, name in KINDS if isinstance(error, kind))
            return _refusal(kind, error.what, error.where, error.do)
        except (OSError, RecursionError) as error:
            return _refusal("bad", Text("the files cannot be read: {kind}", kind=type(error).__name__), "",
                            Text("check them and their rights"))
        except Exception as error:
            logger.exception("Quantized Transformers: a web request failed")
            return _refusal("failed", Text("this fails in this version: {kind}", kind=type(error).__name__), "",
                            Text("report it, with ComfyUI's log"))

    def describe(self, values: dict[str, Any]) -> dict[str, Any]:
        """A card, for the values of a Query. Raises CheckpointError."""
        query = Query(**values)
        stamp = confined(query.reference, query.revision, query.weights_name).stamp
        stamp += "".join(confined(one).stamp for one in query.overrides)
        if query.base:
            try:
                stamp += confined(query.base).stamp
            except CheckpointError:  # its own badge says so
                query = replace(query, base="")
        kept = self._cards.get((query, stamp))
        if kept is None:
            try:
                kept = card(query)
            except CheckpointError as error:
                kept = error
            self._cards[query, stamp] = kept
        self._cards.move_to_end((query, stamp))
        if len(self._cards) > KEPT:
            self._cards.popitem(last=False)
        if isinstance(kept, CheckpointError):
            raise kept.with_traceback(None)
        return kept

    def migrate(self, body: str) -> dict[str, Any]:
        """A workflow as JSON text, migrated. Raises CheckpointError."""
        from ..makers.migrate import migrate

        try:
            workflow = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(Text("invalid JSON: {kind}", kind=type(error).__name__), Text("the request"),
                                  Text("correct it")) from error
        if not isinstance(workflow, dict):
            raise CheckpointError(Text("this is no workflow"), Text("the request's body"),
                                  Text("send a workflow's JSON object"))
        done = migrate(workflow)
        return {"workflow": done.workflow, "changes": done.changes, "left": done.left}

    def serve(self, values: dict[str, str]) -> dict[str, Any]:
        """What Run on server asks (served.py). Raises CheckpointError."""
        from .served import served

        return served(values)


def _refusal(kind: str, what: str, where: str, do: str) -> dict[str, Any]:
    return {"error": kind, **packed({"what": what, "where": where, "do": do})}


def serve(comfyui: str) -> None:
    """Answer until stdin ends. `comfyui` is the folder of the server's ComfyUI, or empty."""
    logging.basicConfig(format="%(message)s")  # to stderr, which is the server's
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    if comfyui:
        host.start_when_needed(comfyui)
    answers = Answers()
    for line in sys.stdin.buffer:
        out.write(json.dumps(answers.answer(json.loads(line))).encode("ascii") + b"\n")
        out.flush()

"""What the web routes ask of files, answered in a process of its own.

Parsing holds Python's interpreter lock, and what is parsed here was written by others; a server that does it in a
thread stops answering meanwhile. This process needs neither torch nor ComfyUI, but for models that only ComfyUI knows:
for the first of those it starts one, on the CPU. It speaks JSON, one object a line: requests on stdin, answers on
stdout, each behind what it does {"now": ...} (views/helper.py, whose process this is, says what that is for). It ends
when stdin does.
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
from ..loaders.files import strict
from ..loaders.prompts import Prompt
from ..loaders.queries import Query
from ..views import queue_check
from ..views.card import card
from ..views.confine import OutsideError, TooLargeError, confined

KEPT = 512  # cards of the last different questions
KINDS = ((OutsideError, "outside"), (TooLargeError, "too large"), (MissingFiles, "missing"), (OtherKind, "other kind"),
         (CheckpointError, "bad"))
logger = logging.getLogger(__name__)


class AgainError(Exception):
    """Files that have ended a process like this one before."""


class Answers:
    """The questions; "nothing" only finds out that it runs. Cards and refusals are kept while no file behind them
    changes. `tell` says what is done now: "reading" the files of a stamp."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell, self._refused = tell, frozenset[str]()
        self._cards: OrderedDict[tuple[Query, str], dict[str, Any] | CheckpointError] = OrderedDict()
        self._ask: dict[str, Callable[[Any], Any]] = {
            "describe": self.describe, "migrate": self.migrate, "serve": self.serve, "check": self.check,
            "nothing": lambda _: None}

    def _reading(self, stamp: str) -> None:
        """Files of this stamp are read next. Raises AgainError."""
        if stamp in self._refused:
            raise AgainError(stamp)
        self._tell("reading", stamp)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"ask": question, "of": what it is about, "folders", "texts", "capability", "refused": stamps} -> {"answer"},
        or {"error", "what", "where", "do"} where "error" is one of KINDS or "failed"; {"error": "again", "stamp"} for
        files of one of the stamps. Sentences are packed (host/texts.py)."""
        self._refused = frozenset(request["refused"])
        host.act_for(request["folders"], request["texts"],
                     tuple(request["capability"]) if request["capability"] else None)
        try:
            return {"answer": packed(self._ask[request["ask"]](request["of"]))}
        except AgainError as error:
            return {"error": "again", "stamp": str(error)}
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
            self._reading(stamp)
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

    def check(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """{"code", "text"} of what a node of a prompt would fail on (views/queue_check.py), and whether it is "quick"
        to find; or None."""
        prompt = Prompt(values["prompt"], values["refers"], lambda kind: tuple(values["outputs"].get(kind, ())))
        found = queue_check.problem(prompt, values["node"], self._reading)
        return {**found._asdict(), "quick": queue_check.quick(prompt, values["node"])} if found else None

    def migrate(self, body: str) -> dict[str, Any]:
        """A workflow as JSON text, migrated, as JSON text again. Raises CheckpointError."""
        from ..makers.migrate import migrate

        self._reading("")
        workflow = strict.parse(body, Text("the request's body"), Text("correct it"))
        if not isinstance(workflow, dict):
            raise CheckpointError(Text("this is no workflow"), Text("the request's body"),
                                  Text("send a workflow's JSON object"))
        done = migrate(workflow)
        return {"workflow": json.dumps(done.workflow), "changes": done.changes, "left": done.left}

    def serve(self, values: dict[str, str]) -> dict[str, Any]:
        """What Run on server asks (served.py). Raises CheckpointError."""
        from .served import served

        self._reading("")
        return served(values)


def _refusal(kind: str, what: str, where: str, do: str) -> dict[str, Any]:
    return {"error": kind, **packed({"what": what, "where": where, "do": do})}


def serve(comfyui: str) -> None:
    """Answer until stdin ends. `comfyui` is the folder of the server's ComfyUI, or empty."""
    logging.basicConfig(format="%(message)s")  # to stderr, which is the server's
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def send(value: dict[str, Any]) -> None:
        out.write(json.dumps(value).encode("ascii") + b"\n")
        out.flush()

    def tell(now: str, stamp: str = "") -> None:
        send({"now": now, "stamp": stamp})

    if comfyui:
        host.start_when_needed(comfyui, lambda: tell("starting"))
    answers = Answers(tell)
    for line in sys.stdin.buffer:
        send(answers.answer(json.loads(line)))

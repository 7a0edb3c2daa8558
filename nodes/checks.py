"""What nodes ask when they are asked themselves: the checks that answer before a prompt is queued, by what two runs are
told apart, and what the web part must know of them. ComfyUI's start does without all of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import fields
from functools import cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

from comfy_api.latest import io

from .. import host
from ..host.texts import Text, asked, usual
from ..loaders.errors import CheckpointError
from ..loaders.families import choices_of
from ..loaders.files.places import cleaned, downloadable, find_path
from ..loaders.locate import locate
from . import lists

logger = logging.getLogger(__name__)


def chosen(reference: str | None, listed: str | None) -> str:
    """What a node loads: the free reference where there is one, else what is chosen in the list."""
    return cleaned(reference) or cleaned(listed)


def check_reference(reference: str | None, download: bool | None = False) -> bool | str:
    """validate_inputs: True, or why the free reference cannot be resolved."""
    return not cleaned(reference) or _found(cleaned(reference), download)


def _found(reference: str, download: bool | None) -> bool | str:
    if not (download and downloadable(reference)):
        try:
            find_path(reference)
        except CheckpointError as error:
            return str(error)
    return True


def check_choice(listed: str | None, known: Iterable[str], reference: str | None,
                 download: bool | None = False) -> bool | str:
    """validate_inputs of a list and the reference that wins over it: True, or why neither can be resolved.

    A list that validate_inputs has as an argument is not compared with its options by the host (execution.py,
    validate_inputs), so a shared workflow may name what is not here as long as its reference is, or name it by another
    spelling. `known` are the repo ids of the list: the load says how to get them. None comes from another node.
    """
    if reference is None or cleaned(reference):
        return check_reference(reference, download)
    if listed is None or listed in known:
        return True
    return _found(str(listed), download)


def check_new(output: str | None, references: Mapping[str, str | None],
              target: Callable[[str, list[Path]], object]) -> None:
    """Raise CheckpointError where what a node reads is not given or not here, or `target(output, what it reads)`
    refuses the output. None comes by a link, and is looked at when the node runs."""
    read = []
    for name, reference in references.items():
        if reference is not None and not cleaned(reference):
            raise CheckpointError(Text("no {name} is given", name=name), "",
                                  Text("give a path, or a repo id that is on this machine"))
        read += [find_path(reference)] if reference is not None else []
    if output is not None:
        target(new_name(output), read)


def new_name(text: str) -> str:
    """The name of what a node writes, as typed or pasted. A relative one may have the separators of Windows.

    Raises CheckpointError for a full path of Windows where that would only be an odd name.
    """
    name = cleaned(text)
    if os.name == "nt" or name.startswith(("/", "~")):
        return name
    if PureWindowsPath(name).drive:
        raise CheckpointError(Text("this is a path of Windows, which this machine does not run"), name,
                              Text("give a name relative to ComfyUI's folders, or a path of this machine"))
    return name.replace("\\", "/")


def referring(classes: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Node id -> what the web part must know to ask about it, of every node that takes a free reference: `input`, the
    list that the reference wins over; `others`, the inputs that choose among the checkpoint's files; `kind`, that of
    the catalog's entries it loads, or None."""
    from ..loaders.queries import Query
    from ..views.catalog import LOADS_WITH

    asked = {field.name for field in fields(Query)} - {"reference"}
    kinds = {node: kind for kind, (node, _) in LOADS_WITH.items()}
    found = {}
    for schema in (cls.define_schema() for cls in classes):
        names = [given.id for given in schema.inputs]
        if "reference" in names and "server" not in names:  # whose files are another machine's
            listed = next(given.id for given in schema.inputs if isinstance(given, io.Combo.Input))
            found[schema.node_id] = {"input": listed, "kind": kinds.get(schema.node_id),
                                     "others": [name for name in names if name in asked - {listed}]}
    return found


_prompt: ContextVar[dict[str, Any] | None] = ContextVar("prompt", default=None)


def keep_prompt(data: Any) -> Any:
    """For host.on_prompt: what is posted, and the language of the page that posts it, kept for the checks of its nodes,
    which the host asks in the same task."""
    prompt, client = (data.get("prompt"), data.get("client_id")) if isinstance(data, dict) else (None, None)
    asked.set(host.language_of(client) or usual())
    _prompt.set(prompt if isinstance(prompt, dict) and not host.lacking("checks before the queue") else None)
    return data


async def ready(cls: Any, listed: str | None, name: str, reference: str | None) -> bool | str:
    """validate_inputs of a node that refers to a checkpoint: True, or why it would fail when the prompt runs, by its
    files and by what it is wired to (views/queue_check.py). `cls` is the node as the host asks it, with its own id;
    `name` is that of its list (lists.py). The files are read by the helper process, because the host asks in its event
    loop. Other packs may have taught this ComfyUI more than that process knows: what it finds wrong is looked for here,
    too, in a thread, where that is quick.

    Where nothing tells which prompt it is of, the reference alone is looked for (`check_choice`).
    """
    prompt, node = _prompt.get(), getattr(getattr(cls, "hidden", None), "unique_id", None)
    if prompt is None or node not in prompt:
        return check_choice(listed, lists.known(name), reference, True)
    from ..loaders.prompts import Prompt
    from ..views import helper
    from ..views.queue_check import Problem, problem

    kinds = {str(one.get("class_type")) for one in prompt.values() if isinstance(one, dict)}
    of = {"prompt": prompt, "node": node, "refers": _referring(),
          "outputs": {kind: host.output_types(kind) for kind in kinds}}
    beside = partial(asyncio.get_running_loop().run_in_executor, helper.checking())
    try:
        found = await beside(helper.shared().ask, "check", of)
        if not found:
            return True
        said: Problem | None = Problem(found["code"], found["text"])
        if found["quick"] and found["code"] not in ("missing", "nothing_chosen"):
            said = await beside(problem, Prompt(prompt, _referring(), host.output_types), node, lambda stamp: None)
        return str(said) if said else True
    except helper.HelperError as error:
        if error.kind == "bad":
            return str(Problem("unreadable", CheckpointError(error.what, reference or listed or "", error.do).text))
        logger.error("Quantized Transformers: node %s cannot be checked before it runs: %s", node, error.what)
        return True  # a fault of this check must not keep anything from running
    except Exception:
        logger.exception("Quantized Transformers: node %s cannot be checked before it runs", node)
        return True


@cache
def _referring() -> dict[str, dict[str, Any]]:
    from . import node_classes

    return referring(node_classes())


def fingerprint(listed: str, reference: str = "", **inputs: Any) -> str:
    """A hash of a transformer node's inputs and of the files behind them."""
    def files() -> list[str]:
        return locate(chosen(reference, listed), component=inputs.get("component", "transformer"),
                      weights_name=inputs.get("weights_name", ""), revision=inputs.get("revision", ""),
                      need_weights=inputs.get("weights", "load") == "load",
                      choices=choices_of(inputs)).paths

    return stamp(files, listed, reference, sorted(inputs.items(), key=str))


def stamp(files: Callable[[], Iterable[str]], *facts: Any) -> str:
    """A hash of `facts` and of size and time of every file, so that changed files are loaded again."""
    parts = list(map(repr, facts))
    try:
        for path in files():
            stat = os.stat(path)
            parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    except (CheckpointError, OSError) as error:
        parts.append(repr(error))  # the same in every language
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

"""What a prompt would fail on, found before it is queued: for each node of this pack what its badge would say, and
whether what it loads fits what it is wired to. Headers and configurations only, as for a badge.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

from ..host.texts import Text, said
from ..loaders.errors import CheckpointError, MissingFiles
from ..loaders.files.places import downloadable
from ..loaders.files.selection import WEIGHTS
from ..loaders.prompts import Prompt, question
from ..loaders.queries import TEXT_ENCODER, VAE, Query, locate_parts
from .card import base_dims, card
from .confine import check_headers

KEPT = 64  # answers
_QUICK = 1_000_000  # bytes of one header, and of all JSON files; published ones stay below
_kept: OrderedDict[tuple[Any, ...], Problem | None] = OrderedDict()


class Problem(NamedTuple):
    """`code` is one of: nothing_chosen, missing, unreadable, not_loadable, does_not_fit, other_text_encoder. It is the
    last line of what the API answers, and stays what it is from version to version; `text` may not."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{said(self.text)}\n  code: {self.code}"


def problem(prompt: Prompt, node: str, reading: Callable[[str], None]) -> Problem | None:
    """Why a node would fail when the prompt runs, as far as its files and its wiring tell. `reading` is called with a
    hash of its files before any of them is read."""
    try:
        query = question(prompt, node)
    except CheckpointError as error:
        return Problem("nothing_chosen" if "no checkpoint" in error.what else "unreadable", error.text)
    if query is None:
        return None
    try:
        stamp = _stamp(query)
    except CheckpointError as error:
        if isinstance(error, MissingFiles) and prompt.value(node, "download_missing") and downloadable(query.reference):
            return None
        return Problem("missing" if isinstance(error, MissingFiles) else "unreadable", error.text)
    reading(sha256(repr(stamp).encode("utf-8", "surrogateescape")).hexdigest())
    key = query, stamp
    if key not in _kept:
        _kept[key] = _of_files(query)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    found = _kept[key]
    if found is None and query.node == TEXT_ENCODER:
        return _other_model(prompt, node, query)
    return found


def quick(prompt: Prompt, node: str) -> bool:
    """Whether so little is read for a node that its problem can be looked for beside a server's event loop."""
    try:
        query = question(prompt, node)
        paths = [path for source in locate_parts(query) for path in source.paths] if query else []
        check_headers([path for path in paths if path.lower().endswith(WEIGHTS)], _QUICK)
        return sum(os.path.getsize(path) for path in paths if not path.lower().endswith(WEIGHTS)) < _QUICK
    except (CheckpointError, OSError):
        return False


def _stamp(query: Query) -> tuple[Any, ...]:
    """Path, size and time of every file that a query is about."""
    paths = [path for source in locate_parts(query) for path in source.paths]
    try:
        return tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)
    except OSError as error:
        raise CheckpointError(Text("a file cannot be read: {reason}", reason=error.strerror), query.reference,
                              Text("check it")) from error


def _of_files(query: Query) -> Problem | None:
    try:
        found = card(query)
    except CheckpointError as error:
        return Problem("unreadable", error.text)
    if query.node == "QT_InspectCheckpoint":  # it is there to say what is wrong
        return None
    if found["problems"]:
        problem, others = found["problems"][0], len(found["problems"]) - 1
        return _problem("not_loadable", Text("{problem} (and {count} more)", problem=problem, count=others) if others
                        else problem, query, Text("Inspect Checkpoint lists all of it"))
    if found["mismatch"]:
        return _problem("does_not_fit", Text("it does not fit its base: {why}", why=found["mismatch"]), query,
                        Text("choose one made for {base}", base=query.base))
    return None


def _problem(code: str, what: str, query: Query, do: str) -> Problem:
    return Problem(code, CheckpointError(what, query.reference, do).text)


def _other_model(prompt: Prompt, node: str, query: Query) -> Problem | None:
    """Text encoders of another kind of model than the one that is sampled with what they make of a prompt."""
    from ..loaders.components.text_encoder import family_name

    family = family_name(query.reference, query.revision)
    if not family:
        return None
    for sampler in prompt.nodes:
        conditioned = any(node in prompt.above(made, "CLIP") for source in prompt.sources(sampler, "CONDITIONING")
                          for made in (source, *prompt.above(source, "CONDITIONING")))
        if not conditioned:
            continue
        for above in prompt.above(sampler, "MODEL"):
            architecture = _architecture(prompt, above)
            if architecture:
                if not family.startswith(architecture):
                    return _problem("other_text_encoder", Text(
                        "these are the text encoders of {family}, and node {sampler} samples {architecture} with what "
                        "they make of a prompt", family=family, sampler=sampler, architecture=architecture), query,
                                    Text("choose a base of {architecture}", architecture=architecture))
                break
    return None


def _architecture(prompt: Prompt, node: str) -> str:
    """What a node's MODEL is, of those whose text encoders this pack knows; empty where that is not known."""
    from ..loaders.architectures import ARCHITECTURES

    try:
        query = question(prompt, node)
        if query is None or query.node in (TEXT_ENCODER, VAE):
            return ""
        name, _ = base_dims(replace(query, base=query.reference, base_component=query.component))
    except CheckpointError:  # its own answer says so
        return ""
    return name if name in {architecture.name for architecture in ARCHITECTURES} else ""

"""What a prompt would fail on, found before it is queued: for each node of this pack what its badge would say, and
whether what it loads fits what it is wired to. Headers and configurations only, as for a badge.

A prompt is the API's: node id -> {"class_type", "inputs"}, where a list of two is a link [node id, number of output].
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..host.texts import Text, said
from ..loaders.errors import CheckpointError, MissingFiles
from ..loaders.files.places import cleaned, downloadable
from .card import NODES, TEXT_ENCODER, Query, base_dims, card, locate_parts

BASE, OVERRIDE = "QT_LoadBaseModel", "QT_ApplyTransformerOverride"
# ComfyUI's own loaders of a MODEL, and the input that names the file.
HOST_LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
KEPT = 64  # answers
_kept: OrderedDict[tuple[Any, ...], Problem | None] = OrderedDict()


class Problem(NamedTuple):
    """`code` is one of: nothing_chosen, missing, unreadable, not_loadable, does_not_fit, other_text_encoder. It is the
    last line of what the API answers, and stays what it is from version to version; `text` may not."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{said(self.text)}\n  code: {self.code}"


class Prompt:
    """A prompt's nodes. `refers`: node type -> what nodes.checks.referring says of it; `outputs`: node type -> the
    types of its outputs, empty for an unknown one."""

    def __init__(self, nodes: Mapping[str, Any], refers: Mapping[str, Mapping[str, Any]],
                 outputs: Callable[[str], tuple[str, ...]]) -> None:
        self.nodes, self.refers, self.outputs = nodes, refers, outputs

    def type_of(self, node: str) -> str:
        """The class of a node, or empty."""
        return str((self.nodes.get(node) or {}).get("class_type", ""))

    def value(self, node: str, name: str) -> Any:
        """What a widget of a node says; None where it is left out or comes by a link."""
        found = self.nodes[node].get("inputs", {}).get(name)
        return None if isinstance(found, list) else found

    def linked(self, node: str, name: str) -> bool:
        """Whether an input comes by a link."""
        return isinstance(self.nodes[node].get("inputs", {}).get(name), list)

    def sources(self, node: str, kind: str) -> Iterator[str]:
        """The nodes whose outputs of a type ("MODEL") a node takes."""
        for link in (self.nodes.get(node) or {}).get("inputs", {}).values():
            if isinstance(link, list) and len(link) == 2 and str(link[0]) in self.nodes and type(link[1]) is int:
                types = self.outputs(self.type_of(str(link[0])))
                if types[link[1]:link[1] + 1] in ((kind,), ("*",)):
                    yield str(link[0])

    def above(self, node: str, kind: str) -> Iterator[str]:
        """The nodes on the ways that lead to a node by links of one type, the nearest first, each once."""
        seen, wait = {node}, [node]
        while wait:
            for source in self.sources(wait.pop(0), kind):
                if source not in seen:
                    seen.add(source)
                    wait.append(source)
                    yield source


def question(prompt: Prompt, node: str) -> Query | None:
    """What a badge on a node would ask; None where it refers to nothing, or by a link to what is not known yet.

    Raises CheckpointError for values that no widget has.
    """
    kind = prompt.type_of(node)
    refers = prompt.refers.get(kind)
    if refers is None or kind not in NODES or prompt.linked(node, "reference"):
        return None
    reference = cleaned(prompt.value(node, "reference"))
    if not reference and prompt.linked(node, refers["input"]):
        return None
    reference = reference or cleaned(prompt.value(node, refers["input"]))
    given = {name: prompt.value(node, name) for name in refers["others"]}
    query = Query(reference, kind, **{name: value for name, value in given.items() if value not in (None, "")})
    if kind != OVERRIDE:
        return query
    base, component = _base_of(prompt, node)
    return replace(query, base=base, base_component=component)


def _base_of(prompt: Prompt, node: str) -> tuple[str, str]:
    """(reference, component) of the base that an override is applied to; ("", ...) where that is not known."""
    for above in prompt.above(node, "MODEL"):
        kind = prompt.type_of(above)
        name = HOST_LOADERS.get(kind) or (prompt.refers[BASE]["input"] if kind == BASE else "")
        if name:
            if prompt.linked(above, name) or kind == BASE and prompt.linked(above, "reference"):
                break
            free = cleaned(prompt.value(above, "reference")) if kind == BASE else ""
            return free or cleaned(prompt.value(above, name)), str(prompt.value(above, "component") or "transformer")
    return "", "transformer"


def problem(prompt: Prompt, node: str) -> Problem | None:
    """Why a node would fail when the prompt runs, as far as its files and its wiring tell."""
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
    key = query, stamp
    if key not in _kept:
        _kept[key] = _of_files(query)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    found = _kept[key]
    if found is None and query.node == TEXT_ENCODER:
        return _other_model(prompt, node, query)
    return found


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
        if query is None or query.node in (TEXT_ENCODER, "QT_LoadBaseVAE"):
            return ""
        name, _ = base_dims(replace(query, base=query.reference, base_component=query.component))
    except CheckpointError:  # its own answer says so
        return ""
    return name if name in {architecture.name for architecture in ARCHITECTURES} else ""

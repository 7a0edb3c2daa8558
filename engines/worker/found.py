"""What is here of a workflow's references, and what a hub has of the rest. Nothing is loaded, no ComfyUI is started;
hubs are asked about what is missing only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...host.texts import Text, joined
from ...loaders.download_plans import of_load
from ...loaders.errors import CheckpointError, MissingFiles
from ...loaders.files import hub
from ...loaders.files.places import candidates, downloadable
from .asked import Asked
from .loaders import SERVER

LOCAL, HUB, SERVED = "local", "hub", "server"


@dataclass(frozen=True)
class Reference:
    """What was found of one. `where`: "local" for what is on this machine, or can be nowhere else; "hub" where a hub
    has what is missing; "server" for what another machine loads. `sizes`: bytes of the missing files by the path that
    they will have, as far as the hub tells. `licence`: the page of a gated repo."""

    asked: Asked
    where: str
    path: str = ""
    missing: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    licence: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the command's page describes it."""
        one = self.asked
        return {"node": one.node, "class": one.kind, "input": one.input, "reference": one.reference,
                "component": one.component, "where": self.where, "path": self.path, "missing": list(self.missing),
                "bytes_missing": sum(self.sizes.values()), "problem": self.problem or None,
                "licence": self.licence or None}


def look(asked: Iterable[Asked]) -> list[Reference]:
    """What there is of each. Writes nothing."""
    watcher = hub.Watcher(lambda total: lambda amount=1: None)  # one, so that no hub is asked twice for a list
    return [_look(one, watcher) for one in asked]


def bytes_missing(found: Sequence[Reference]) -> int:
    """Of all, each file once."""
    return sum({path: size for one in found for path, size in one.sizes.items()}.values())


def fetch(found: Iterable[Reference], watcher: hub.Watcher) -> list[CheckpointError]:
    """Download what is missing and on a hub into its cache. What goes wrong with one keeps no other from arriving."""
    errors = []
    for one in found:
        if one.missing and one.where == HUB and one.asked.load:
            try:
                one.asked.load(partial(hub.fetch, watcher=watcher))
            except CheckpointError as error:
                errors.append(error)
    return errors


def _look(one: Asked, watcher: hub.Watcher) -> Reference:
    if one.kind == SERVER:
        return Reference(one, SERVED)
    if one.load is None:
        return Reference(one, LOCAL, problem=Text("it comes from another node, and is known when that has run"))
    try:
        sources = one.load(False)
        return Reference(one, LOCAL, os.path.commonpath([path for source in sources for path in source.paths]))
    except CheckpointError as error:
        here = error
    planned = None
    if one.fetched and isinstance(here, MissingFiles) and downloadable(one.reference):
        try:
            planned = of_load(one.load, None, "", watcher)
        except CheckpointError as error:
            here = CheckpointError(Text("{missing}; its size is not known: {why}", missing=here.what, why=error.what),
                                   here.where, here.do)
            if not one.parts:
                return Reference(one, HUB, missing=(one.reference,), problem=here.text)
        if planned and planned[0] not in map(downloadable, one.parts):
            return _planned(one, planned[1])
    if one.parts and (path := next(candidates(one.reference), None)):
        return Reference(one, LOCAL, str(path), problem=Text("whether it lacks something is known when {parts} is here",
                                                             parts=joined(", ", one.parts)))
    return Reference(one, HUB if planned else LOCAL, missing=(one.reference or "-",), problem=here.text)


def _planned(one: Asked, plan: hub.Plan) -> Reference:
    licence = plan.page if plan.gated else ""
    if plan.files is None:
        return Reference(one, HUB, missing=(one.reference,), licence=licence,
                         problem=Text("its files are not shown before its licence is accepted"))
    return Reference(one, HUB, missing=tuple(_name(path, plan.root) for path in plan.missing), licence=licence,
                     sizes={str(path): size for path, size in plan.missing.items()})


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

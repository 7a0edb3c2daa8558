"""What downloads would fetch, and where to: asked of the hubs, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import host
from ..host.texts import Text
from .components.pipeline import locate_each
from .errors import CheckpointError
from .files import hub
from .files.hubs.base import Hub
from .files.places import Fetch, downloadable
from .files.selection import Select
from .files.source import Source
from .files.stores import ModelFolder, Store
from .queries import TEXT_ENCODER, VAE, Query, locate_parts

TARGETS = ("cache", "models")


class Asked(NamedTuple):
    """What is to be downloaded: for which nodes, to where (TARGETS), from which hub where it may be either (""
    for QT_HUB's), and whose licences were accepted."""

    queries: tuple[Query, ...]
    target: str
    hub: str
    licences: frozenset[str]


class _Planned(Exception):  # noqa: N818  # not an error: it ends locate where the download would begin
    def __init__(self, reference: str, plan: hub.Plan) -> None:
        self.reference, self.plan = reference, plan


def where(query: Query, target: str) -> hub.Where | None:
    """Where a query's files go: None for the hub's cache. A revision always goes there: folders hold one."""
    if target == "cache" or query.revision:
        return None
    singles = {TEXT_ENCODER: "text_encoders", VAE: "vae"}.get(query.node, "diffusion_models")

    def place(hub: Hub, repo: str, revision: str) -> Store:
        return ModelFolder(repo, host.download_folder(host.OWN_FOLDER_KEY), host.download_folder(singles), hub.KEY)

    return place


def refuse_no_repo(reference: str) -> None:
    """Raise CheckpointError unless the reference is a repo id, or the name of a published file."""
    if not downloadable(reference):
        raise CheckpointError(Text("only a repo id can be downloaded"), repr(reference[:200]), Text("give owner/name"))


def of_query(query: Query, asked: Asked, watcher: hub.Watcher) -> Iterator[hub.Plan]:
    """What a download of one of the queries would fetch: one plan for each repo that lacks some, as far as can be said
    before what replaces a base's text encoders is here. Raises CheckpointError as a download does."""
    loads: list[Callable[[Fetch], Any]] = [partial(locate_parts, query)]
    loads += [partial(override, reference) for reference in query.overrides]
    for load in loads:
        found = of_load(load, where(query, asked.target), asked.hub, watcher)
        if found:
            yield found[1]


def of_load(load: Callable[[Fetch], Any], where: hub.Where | None, prefer: str,
            watcher: hub.Watcher) -> tuple[str, hub.Plan] | None:
    """(reference, plan) of the first repo of which a load lacks files; None where it lacks none. Raises CheckpointError
    as a download does."""
    def ask(reference: str, revision: str, select: Select, patterns: Sequence[str]) -> Path:
        raise _Planned(reference, hub.plan(reference, revision, select, patterns, watcher, where, prefer))

    try:
        load(ask)
    except _Planned as planned:
        return planned.reference, planned.plan
    return None


def override(reference: str, download: bool | Fetch = False) -> list[Source]:
    """The files of what takes the place of a base's text encoders."""
    return locate_each(reference, download=download)


def answer(asked: Asked) -> dict[str, Any]:
    """The plan of the route `download`, as the package describes it: what is missing of all queries, by repo."""
    watcher = hub.Watcher(lambda total: lambda amount=1: None)
    rows: dict[tuple[str, str, Path], dict[str, Any]] = {}
    every: dict[Path, int] = {}
    failed = []
    for number, query in enumerate(asked.queries):
        try:
            refuse_no_repo(query.reference)
            for found in of_query(query, asked, watcher):
                row = rows.setdefault((found.hub, found.repo, found.folder), {
                    "items": [], "hub": found.hub, "repo": found.repo, "commit": found.commit, "files": {}, "bytes": 0,
                    "least": False, "gated": found.gated, "licence": found.page if found.gated else None,
                    "folder": str(found.folder), "error": None})
                row["items"] += [number] if number not in row["items"] else []
                row["least"] |= bool(query.overrides) or found.files is None
                row["files"] |= {path.relative_to(found.root).as_posix(): size for path, size in found.missing.items()}
                row["bytes"] = sum(row["files"].values())
                every |= found.missing
        except CheckpointError as error:
            failed.append({"items": [number], "repo": query.reference, "error": {
                "error": error.what, "where": error.where, "todo": error.do}})
    free = {row["folder"]: shutil.disk_usage(hub.existing(Path(row["folder"]))).free for row in rows.values()}
    return {"rows": [*rows.values(), *failed], "bytes": sum(every.values()), "free": min(free.values(), default=None)}

"""Which workers a job goes to: those of the pool of its models, else those for all others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...host.texts import Text
from ...loaders.errors import CheckpointError

ANY = "any"  # the workers for what has no pool


@dataclass(frozen=True)
class Pool:
    """So many workers for jobs of one affinity key, and for no others. `key` is empty for ANY."""

    name: str
    count: int
    key: str = ""


@dataclass(frozen=True)
class Asked:
    """--pool NAME=WORKFLOW.json:K."""

    name: str
    file: str
    count: int


def asked(text: str) -> Asked:
    """An argument of --pool."""
    found = re.fullmatch(r"([A-Za-z0-9_-]{1,40})=(.+):([1-9][0-9]{0,3})", text)
    if not found or found[1] == ANY:
        raise CheckpointError(Text("--pool is NAME=WORKFLOW.json:K"), repr(text[:200]),
                              Text("a name of letters, digits, - and _ that is not {any}, a file, and how many workers",
                                   any=ANY))
    return Asked(found[1], found[2], int(found[3]))


def pools(workers: int, named: Sequence[Pool]) -> tuple[Pool, ...]:
    """All pools of a fleet; `workers`: how many take the jobs that no pool is for."""
    for number, pool in enumerate(named):
        for other in named[:number]:
            if other.name == pool.name:
                raise CheckpointError(Text("two pools have this name"), pool.name, Text("give each its own"))
            if other.key == pool.key:
                raise CheckpointError(Text("two pools are for the same models ({key})", key=pool.key),
                                      f"{other.name}, {pool.name}", Text("make it one, with more workers"))
    if workers < 0 or not workers and not named:
        raise CheckpointError(Text("there are no workers"), f"--workers {workers}", Text("give --workers, or --pool"))
    return (*([Pool(ANY, workers)] if workers else []), *named)


def choose(all_pools: Sequence[Pool], key: str) -> Pool:
    """The pool of a key. Raises CheckpointError where there is none for it."""
    for pool in all_pools:
        if pool.key == key:
            return pool
    for pool in all_pools:
        if pool.name == ANY:
            return pool
    raise CheckpointError(Text("no worker is for these models ({key})", key=key), "",
                          Text("start the fleet with a pool for them, or with --workers"))

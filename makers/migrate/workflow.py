"""Migrate a whole workflow, in the format of the page or that of the API, and say what was changed and what was not."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...host.texts import Text, joined
from ...loaders.errors import CheckpointError
from ...loaders.prompts import prompt_in
from .graphs import ApiGraph, Graph, PageGraph
from .rules import NUNCHAKU_MODELS, OPTIONS, Left, convert, foreign, has_rule


@dataclass(frozen=True)
class Migrated:
    """The new workflow (the one given is not changed), a line for each change, and one for each node left, with why."""

    workflow: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def migrate(workflow: dict[str, Any]) -> Migrated:
    """Convert the loader nodes of ComfyUI-nunchaku, ComfyUI-GGUF and SGLang's pack where their files load here.

    `workflow` is what the page saves (subgraphs included), what it exports for the API, or the body of a POST to
    /prompt. Raises CheckpointError for anything else.
    """
    try:
        return _migrated(workflow)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        said = error if len(str(error)) < 200 else "..."
        raise CheckpointError(Text("this workflow is malformed ({kind}: {error})", kind=type(error).__name__,
                                   error=said), "",
                              Text("open it in ComfyUI and save it again")) from error


def _migrated(workflow: dict[str, Any]) -> Migrated:
    done = Migrated(copy.deepcopy(workflow))
    graphs = list(_graphs(done.workflow))
    if not graphs:
        raise CheckpointError(Text("this is no workflow"),
                              do=Text("give a JSON file that ComfyUI saved or exported (API)"))
    blocker = next((kind for graph in graphs for kind in graph.kinds() if _takes_nunchaku(graph, kind)), "")
    kinds = {kind for graph in graphs for kind in graph.kinds()}
    for graph in graphs:
        _migrate_graph(graph, blocker, kinds, done)
    done.left.extend(_group_nodes(done.workflow))
    json.dumps(done.workflow, allow_nan=False)  # of a position "nan" Python makes a number, which JSON has not
    return done


def _graphs(workflow: dict[str, Any]) -> Iterable[Graph]:
    if isinstance(workflow.get("nodes"), list):
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
        yield PageGraph(workflow, subgraphs)
        for inner in subgraphs:
            yield PageGraph(inner, subgraphs, outer=[workflow, *subgraphs])
    elif prompt := prompt_in(workflow):
        yield ApiGraph(prompt)


def _takes_nunchaku(graph: Graph, kind: str) -> bool:
    """Whether a node type that stays needs a MODEL of nunchaku's own loaders (PuLID, IP-Adapter, other LoRA packs)."""
    return kind.startswith("Nunchaku") and not has_rule(kind) and graph.takes_model(kind)


def _migrate_graph(graph: Graph, blocker: str, kinds: Collection[str], done: Migrated) -> None:
    for node in graph.nodes():
        kind = graph.kind(node)
        if not has_rule(kind):
            continue
        result = Left(Text("{blocker} in this workflow takes a MODEL of nunchaku's own loader only", blocker=blocker)) \
            if blocker and kind in NUNCHAKU_MODELS else convert(kind, graph.values(node), kinds)
        if isinstance(result, Left):
            done.left.append(Text("node {name} {kind}: {why}", name=graph.name(node), kind=kind, why=result.why))
            continue
        notes = [*result.notes, *graph.replace(node, result)]
        words = ", ".join(f"{key} {repr(value)[:200]}" for key, value in result.values.items())
        change = Text("node {name} {kind} -> {target} ({words})", name=graph.name(node), kind=kind,
                      target=result.target, words=words)
        if result.more:
            change = Text("{change}, and {count} more behind it", change=change, count=len(result.more))
        done.changes.append(joined("; ", (change, *notes)))
    for node in graph.nodes():
        kind = graph.kind(node)
        if kind == OPTIONS and not graph.is_used(node):
            graph.remove(node)
            done.changes.append(Text("node {name} {kind} removed: its options steer SGLang's runtime",
                                     name=graph.name(node), kind=kind))
        elif not has_rule(kind) and foreign(kind):
            done.left.append(Text("node {name} {kind}: {why}", name=graph.name(node), kind=kind, why=foreign(kind)))


def _group_nodes(workflow: dict[str, Any]) -> Iterable[str]:
    """Group nodes (what came before subgraphs) are not looked into; those that hold nodes of these packs are named."""
    groups = (workflow.get("extra") or {}).get("groupNodes") if isinstance(workflow.get("extra"), dict) else None
    for name, group in (groups or {}).items():
        kinds = {str(node.get("type")) for node in group.get("nodes", ())}
        found = sorted(kind for kind in kinds if has_rule(kind) or foreign(kind))
        if found:
            yield Text("group node {name}: it holds {found}; ungroup it, then migrate again", name=name,
                       found=", ".join(found))

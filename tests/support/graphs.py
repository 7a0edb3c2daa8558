"""What two graphs or prompts differ in by meaning: whatever another frontend or host writes otherwise does not count.

A newer frontend orders links anew, leaves empty lists out and adds fields; a newer host adds inputs to its own nodes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

OURS = "QT_"
NOTE = "MarkdownNote"
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot")


def graph_differences(wanted: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """What a saved graph lacks, has too much or has otherwise: nodes with their values, links, groups; in subgraphs, too."""
    found = _graph_differences(wanted, seen)
    before, after = (_subgraphs(graph) for graph in (wanted, seen))
    found += _only("subgraph", before, after)
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        slots = (([slot["name"] for slot in graph[kind]] for kind in ("inputs", "outputs")) for graph in (a, b))
        found += [f"in {a['name']}: {one}" for one in [
            *_otherwise("subgraph", [("name", a["name"], b["name"]), ("slots", *map(list, slots))]),
            *_graph_differences(a, b)]]
    return found


def _graph_differences(wanted: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    before, after = ({node["id"]: node for node in graph["nodes"]} for graph in (wanted, seen))
    found = [*_only("node", before, after), *_only("link", _links(wanted), _links(seen))]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        values, length = _values(b), len(_values(a))
        own = a["type"].startswith(OURS) or a["type"] == NOTE
        found += _otherwise(f"node {key}", [
            ("type", a["type"], b["type"]), ("title", a.get("title"), b.get("title")), ("mode", a["mode"], b["mode"]),
            ("values", _values(a), values if own else values[:length])])
    groups = (sorted(group["title"] for group in graph.get("groups") or []) for graph in (wanted, seen))
    return found + _otherwise("graph", [("groups", *groups)])


def prompt_differences(wanted: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """What an API prompt lacks, has too much or has otherwise: nodes by id, their titles, their inputs by name."""
    found = _only("node", wanted, seen)
    for key in wanted.keys() & seen.keys():
        a, b = wanted[key], seen[key]
        host = not a["class_type"].startswith(OURS)
        added = {name for name, value in b["inputs"].items()
                 if host and name not in a["inputs"] and not isinstance(value, list)}  # a list is a link
        names = (a["inputs"].keys() | b["inputs"].keys()) - added
        found += _otherwise(f"node {key}", [
            ("type", a["class_type"], b["class_type"]), ("title", a["_meta"]["title"], b["_meta"]["title"]),
            *((name, a["inputs"].get(name), b["inputs"].get(name)) for name in names)])
    return found


def _values(node: dict[str, Any]) -> list[Any]:
    """Widget values in the order of the widgets; a file keeps them as a list or by name."""
    values = node.get("widgets_values") or []
    return list(values.values()) if isinstance(values, dict) else values


def _subgraphs(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {inner["id"]: inner for inner in (graph.get("definitions") or {}).get("subgraphs") or []}


def _links(graph: dict[str, Any]) -> set[str]:
    """Where each link begins and ends: ids of nodes, the number of the output, the name of the input.

    A graph has its links as lists, a subgraph by name, with ends that are its own inputs and outputs."""
    inputs = {node["id"]: node.get("inputs") for node in graph["nodes"]}
    if "outputNode" in graph:
        inputs[graph["outputNode"]["id"]] = graph["outputs"]
    links = [link if isinstance(link, list) else [link[name] for name in LINK] for link in graph["links"]]
    return {f"{origin}.{output} → {target}.{inputs[target][slot]['name']}" for _, origin, output, target, slot, *_ in links}


def _only(what: str, wanted: Iterable[Hashable], seen: Iterable[Hashable]) -> list[str]:
    wanted, seen = set(wanted), set(seen)
    return [*(f"{what} {one} is missing" for one in wanted - seen),
            *(f"{what} {one} is too much" for one in seen - wanted)]


def _otherwise(where: str, pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{where}: {what} is {b!r}, not {a!r}" for what, a, b in pairs if a != b]

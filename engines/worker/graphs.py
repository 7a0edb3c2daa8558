"""A workflow as the page saves it -> the prompt that the page would send of it: subgraphs taken apart (node 5 in the
subgraph node 12 is "12:5"), muted nodes left out, bypassed ones and reroutes passed through. Only widgets that name
files, or choose among them, are kept (loaders.WIDGETS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.prompts import prompt_in
from .loaders import SERVER, WIDGETS

MUTED, BYPASSED = 2, 4
_MOST = 300  # subgraphs, each as often as it is used; no page goes so far
_IN, _OUT = -10, -20  # ids of a subgraph's own two ends
_PRIMITIVES = ("PrimitiveString", "PrimitiveStringMultiline")
_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
Node = Mapping[str, Any]


class NoWorkflowError(CheckpointError):
    """A file that holds no workflow."""


class _Value(NamedTuple):
    """What a widget says that an input hangs on."""

    value: Any


def prompt_of(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a workflow in the page's format or the API's, texts of primitive nodes in the place of links.

    Raises NoWorkflowError for anything else, CheckpointError for one that is malformed or hides loaders in group nodes.
    """
    try:
        if isinstance(workflow.get("nodes"), list):
            _refuse_groups(workflow)
            subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
            level = _Level(workflow, {str(inner["id"]): inner for inner in subgraphs})
            prompt = dict(level.prompt())
        else:
            found = prompt_in(workflow)
            if found is None:
                raise NoWorkflowError(Text("this is no workflow"),
                                      do=Text("give a JSON file that ComfyUI saved or exported (API)"))
            prompt = {str(name): dict(node, inputs=dict(node.get("inputs") or {})) for name, node in found.items()}
        for node in prompt.values():
            node["inputs"] = {name: _literal(prompt, value) for name, value in node["inputs"].items()}
        return prompt
    except CheckpointError:  # a ValueError, too
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(Text("this workflow is malformed ({kind}: {error})", kind=type(error).__name__,
                                   error=error), "", Text("open it in ComfyUI and save it again")) from error


def _literal(prompt: Mapping[str, Any], value: Any) -> Any:
    """What a primitive node says that a link leads to; any other value as it is."""
    if isinstance(value, list) and len(value) == 2:
        source = prompt.get(str(value[0])) or {}
        said = (source.get("inputs") or {}).get("value")
        if source.get("class_type") in _PRIMITIVES and isinstance(said, str):
            return said
    return value


def _refuse_groups(workflow: Mapping[str, Any]) -> None:
    """Group nodes, which came before subgraphs, are not looked into."""
    groups = (workflow.get("extra") or {}).get("groupNodes") or {}
    used = {str(node.get("type")).removeprefix("workflow>").removeprefix("workflow/") for node in workflow["nodes"]}
    for name, group in groups.items():
        found = sorted({str(node.get("type")) for node in group.get("nodes", ())} & WIDGETS.keys())
        if found and name in used:
            raise CheckpointError(
                Text("group node {name} holds {found}, and group nodes are not looked into", name=name,
                     found=", ".join(found)), "", Text("ungroup it, or make it a subgraph"))


class _Level:
    """One graph of a workflow: the outermost, or a subgraph in the place of `holder`, a node of `outer`."""

    def __init__(self, graph: Mapping[str, Any], subgraphs: Mapping[str, Any], outer: _Level | None = None,
                 holder: Node | None = None) -> None:
        self.graph, self.subgraphs, self.outer, self.holder = graph, subgraphs, outer, holder
        self.count: list[int] = outer.count if outer else [0]  # of the whole workflow
        self.count[0] += 1
        if self.count[0] > _MOST:
            raise ValueError(Text("subgraphs without end"))
        self.prefix: str = f"{outer.prefix}{holder['id']}:" if outer and holder else ""
        self.nodes = {str(node["id"]): node for node in graph["nodes"]}
        # id -> (node and slot that it comes from, node and slot that it goes to)
        self.links = {_part(link, 0): tuple(_part(link, part) for part in (1, 2, 3, 4)) for link in graph["links"]}
        self.inner = {name: _Level(subgraphs[str(node["type"])], subgraphs, self, node)
                      for name, node in self.nodes.items() if str(node["type"]) in subgraphs and _runs(node)}

    def prompt(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, node) of what would run."""
        for name, node in self.nodes.items():
            if name in self.inner:
                yield from self.inner[name].prompt()
            elif _runs(node):
                yield f"{self.prefix}{name}", {"class_type": str(node["type"]), "inputs": self.inputs(node)}

    def inputs(self, node: Node) -> dict[str, Any]:
        """Widgets by their names, under what their sockets hang on."""
        found = _widgets(node)
        for socket in node.get("inputs") or ():
            name, link = str((socket.get("widget") or {}).get("name") or socket["name"]), socket.get("link")
            source = self.source(link) if link is not None else None
            if isinstance(source, _Value):
                found[name] = source.value
            elif source is not None:
                found[name] = source
        return found

    def source(self, link: Any, hops: int = 0) -> list[Any] | _Value | None:
        """[node, slot] that a link comes from, or the widget's value; None where it ends nowhere."""
        if link not in self.links or hops > 4 * len(self.links):
            return None
        name, slot = str(self.links[link][0]), int(self.links[link][1])
        if name == str(_IN):
            return self.outer.given(self.holder, self, slot) if self.outer and self.holder else None
        node = self.nodes.get(name)
        if node is None or node.get("mode") == MUTED:
            return None
        if name in self.inner:
            return self.inner[name].result(slot)
        if node["type"] == "PrimitiveNode":
            return _Value((node.get("widgets_values") or [None])[0])
        if node["type"] == "Reroute" or node.get("mode") == BYPASSED:
            passed = _passed(node, slot)
            return None if passed is None else self.source(passed, hops + 1)
        return [f"{self.prefix}{name}", slot]

    def result(self, slot: int) -> list[Any] | _Value | None:
        """What leaves this subgraph by an output."""
        return self.source(next((name for name, (_, _, target, place) in self.links.items()
                                 if str(target) == str(_OUT) and int(place) == slot), None))

    def given(self, holder: Node, inner: _Level, slot: int) -> list[Any] | _Value | None:
        """What comes into a subgraph by an input: through the holder's socket, or from the widget it has for it."""
        wanted = str(inner.graph["inputs"][slot]["name"])
        socket: Node = next((one for one in holder.get("inputs") or () if one["name"] == wanted), {})
        if socket.get("link") is not None:
            return self.source(socket["link"])
        stored = holder.get("widgets_values") or []
        if isinstance(stored, dict):
            return _Value(stored[wanted]) if wanted in stored else None
        shown = _shown(holder)
        if len(shown) != len(stored):  # one that keeps no sockets for widgets
            shown = [str(one["name"]) for number, one in enumerate(inner.graph["inputs"]) if inner.is_widget(number)]
        return _Value(stored[shown.index(wanted)]) if wanted in shown[:len(stored)] else None

    def is_widget(self, slot: int) -> bool:
        """Whether what comes into this subgraph by an input goes to a widget."""
        for source, number, target, place in self.links.values():
            if str(source) == str(_IN) and int(number) == slot:
                node = self.nodes.get(str(target)) or {}
                return "widget" in (node.get("inputs") or [])[int(place)]
        return False


def _part(link: Any, part: int) -> Any:
    return link[part] if isinstance(link, list) else link[_LINK[part]]


def _runs(node: Node) -> bool:
    return node.get("mode") not in (MUTED, BYPASSED) and node["type"] not in ("PrimitiveNode", "Reroute")


def _shown(node: Node) -> list[str]:
    """The widgets that have a socket, in order."""
    return [str(socket["widget"]["name"]) for socket in node.get("inputs") or () if socket.get("widget")]


def _widgets(node: Node) -> dict[str, Any]:
    stored, kind = node.get("widgets_values") or [], str(node["type"])
    if isinstance(stored, dict):
        return dict(stored)
    names: tuple[str, ...] | list[str] = WIDGETS.get(kind, ())
    if not names or kind == SERVER:  # which may come to have others
        shown = _shown(node)
        names = shown if len(shown) == len(stored) else names
    if not names and kind in _PRIMITIVES:
        names = ("value",)
    return dict(zip(names, stored, strict=False))


def _passed(node: Node, slot: int) -> Any:
    """The link that a bypassed node or a reroute passes on as its output: of the same place, else of the same type."""
    sockets = node.get("inputs") or []
    if node["type"] == "Reroute":
        return sockets[0].get("link") if sockets else None
    kind = (node.get("outputs") or [])[slot]["type"]
    fitting = [socket for socket in (*sockets[slot:slot + 1], *sockets) if socket.get("type") == kind]
    return next((socket["link"] for socket in fitting if socket.get("link") is not None), None)

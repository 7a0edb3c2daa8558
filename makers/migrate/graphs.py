"""The two formats of a workflow behind one interface: the page's (positional widgets, links with ids) and the API's."""

from __future__ import annotations

from typing import Any, Protocol

from ...host.texts import Text
from .rules import SOURCES, TARGETS, Conversion

Item = Any  # a node, in the format of its graph


class Graph(Protocol):
    """One level of a workflow."""

    def kinds(self) -> list[str]:
        """The node types in it."""
        ...

    def nodes(self) -> list[Item]:
        """A snapshot of its nodes."""
        ...

    def name(self, node: Item) -> str:
        """How to speak of a node."""
        ...

    def kind(self, node: Item) -> str:
        """A node's type."""
        ...

    def values(self, node: Item) -> dict[str, Any]:
        """Widget values by name; a linked one is a list."""
        ...

    def takes_model(self, kind: str) -> bool:
        """Whether a node of this type has a MODEL connected."""
        ...

    def is_used(self, node: Item) -> bool:
        """Whether anything is connected to a node's outputs."""
        ...

    def replace(self, node: Item, to: Conversion) -> list[str]:
        """Convert a node in its place; says which connections got lost."""
        ...

    def remove(self, node: Item) -> None:
        """Take a node out that nothing is connected to."""
        ...


class ApiGraph:
    """{id: {"class_type", "inputs"}}."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        self.prompt = prompt

    def kinds(self) -> list[str]:
        return [str(node["class_type"]) for node in self.prompt.values()]

    def nodes(self) -> list[Item]:
        return list(self.prompt)

    def name(self, node: Item) -> str:
        return str(node)

    def kind(self, node: Item) -> str:
        return str(self.prompt[node]["class_type"])

    def values(self, node: Item) -> dict[str, Any]:
        return dict(self.prompt[node].get("inputs", {}))

    def takes_model(self, kind: str) -> bool:
        return any(node["class_type"] == kind and isinstance(node.get("inputs", {}).get("model"), list)
                   for node in self.prompt.values())

    def is_used(self, node: Item) -> bool:
        return any(self._links_to(value, node) for other in self.prompt.values()
                   for value in other.get("inputs", {}).values())

    @staticmethod
    def _links_to(value: Any, node: Item) -> bool:
        return isinstance(value, list) and len(value) == 2 and str(value[0]) == str(node)

    def replace(self, node: Item, to: Conversion) -> list[str]:
        item = self.prompt[node]
        old = item.get("inputs", {})
        target = TARGETS[to.target]
        sockets = {new: old[name] for name, new in to.renamed.items()
                   if name in old and isinstance(old[name], list) and new not in to.values}
        lost: list[str] = [Text("the connection to {name} is gone", name=name) for name, value in old.items()
                           if isinstance(value, list) and name not in to.renamed and name != "sgld_options"]
        title = (item.get("_meta") or {}).get("title")
        item["class_type"] = to.target
        item["inputs"] = dict(zip(target.widgets, target.defaults, strict=True)) | to.values | sockets
        last = str(node)
        for values in to.more:
            name = str(self._free())
            self._move_links(last, name)
            self.prompt[name] = {"class_type": to.target, "inputs": {**values, "model": [last, 0]}}
            if title:
                self.prompt[name]["_meta"] = {"title": title}
            last = name
        return lost

    def _free(self) -> int:
        return max((int(name) for name in self.prompt if str(name).isdigit()), default=0) + 1

    def _move_links(self, old: str, new: str) -> None:
        """What was connected to one node's first output is connected to another's."""
        for other in self.prompt.values():
            for name, value in other.get("inputs", {}).items():
                if self._links_to(value, old):
                    other["inputs"][name] = [new, value[1]]

    def remove(self, node: Item) -> None:
        del self.prompt[node]


class PageGraph:
    """A graph as the page saves it, or one of its subgraphs (`outer`: where wrappers of it can be)."""

    def __init__(self, graph: dict[str, Any], subgraphs: list[dict[str, Any]],
                 outer: list[dict[str, Any]] | None = None) -> None:
        self.graph, self.outer = graph, outer or []
        self.ids = {str(inner.get("id")) for inner in subgraphs}

    def kinds(self) -> list[str]:
        return [str(node.get("type")) for node in self.graph["nodes"]]

    def nodes(self) -> list[Item]:
        return list(self.graph["nodes"])

    def name(self, node: Item) -> str:
        if not self.outer:
            return str(node["id"])
        return Text("{node} in {graph}", node=node["id"], graph=self.graph.get("name") or Text("a subgraph"))

    def kind(self, node: Item) -> str:
        return str(node.get("type"))

    def values(self, node: Item) -> dict[str, Any]:
        stored = node.get("widgets_values") or []
        widgets = SOURCES[node["type"]].widgets
        return dict(stored) if isinstance(stored, dict) else dict(zip(widgets, stored, strict=False))

    def takes_model(self, kind: str) -> bool:
        return any(node.get("type") == kind and any(socket.get("type") == "MODEL" and socket.get("link") is not None
                                                    for socket in node.get("inputs") or ())
                   for node in self.graph["nodes"])

    def is_used(self, node: Item) -> bool:
        return any(output.get("links") for output in node.get("outputs") or ())

    def replace(self, node: Item, to: Conversion) -> list[str]:
        target = TARGETS[to.target]
        lost = self._inputs(node, to)
        self._proxies(node, to)
        node["type"] = to.target
        node["widgets_values"] = self._widgets(to.target, to.values)
        first = (node.get("outputs") or [{}])[0]
        node["outputs"] = [{"name": name, "type": kind, "links": None} for name, kind in target.outputs]
        node["outputs"][0] |= {key: first[key] for key in ("links", "slot_index", "label") if key in first}
        properties = dict(node.get("properties") or {})
        for key in ("ver", "aux_id", "widget_ue_connectable"):
            properties.pop(key, None)
        node["properties"] = properties | {"Node name for S&R": to.target, "cnr_id": target.pack}
        for i, values in enumerate(to.more):
            node = self._append(node, to.target, values, 40 * (i + 1))
        return lost

    @staticmethod
    def _widgets(target: str, values: dict[str, Any]) -> list[Any]:
        known = TARGETS[target]
        return [values.get(name, default) for name, default in zip(known.widgets, known.defaults, strict=True)]

    def _inputs(self, node: Item, to: Conversion) -> list[str]:
        """Sockets and linked widgets under their new names, at their new positions; the rest goes."""
        target = TARGETS[to.target]
        old = node.get("inputs") or []
        kept: dict[str, dict[str, Any]] = {}
        lost: list[str] = []
        for socket in old:
            name = (socket.get("widget") or {}).get("name") or socket["name"]
            new = to.renamed.get(name)
            link = socket.get("link")
            if new is not None and (link is not None or new not in target.widgets):
                kept[new] = {**socket, "name": new} | ({"widget": {"name": new}} if new in target.widgets else {})
                kept[new].pop("localized_name", None)
            elif link is not None:
                self._cut(link)
                if socket.get("type") != "SGLD_OPTIONS":
                    lost.append(Text("the connection to {name} is gone", name=name))
        for name, kind in target.sockets:
            kept.setdefault(name, {"name": name, "type": kind, "link": None})
        order = [*(name for name, _ in target.sockets), *target.widgets]
        node["inputs"] = sorted(kept.values(), key=lambda socket: order.index(socket["name"]))
        for slot, socket in enumerate(node["inputs"]):
            if socket.get("link") is not None:
                self._set(self._link(socket["link"]), "target_slot", slot)
        return lost

    def _append(self, before: Item, kind: str, values: dict[str, Any], offset: int) -> Item:
        """A node of one MODEL input behind another: takes over what was connected to its first output."""
        name, link = self._next("node"), self._next("link")
        moved = before["outputs"][0].get("links")
        node = {**before, "id": name, "pos": [float(before["pos"][0]) + offset, float(before["pos"][1]) + offset],
                "widgets_values": self._widgets(kind, values), "properties": dict(before["properties"]),
                "inputs": [{"name": "model", "type": "MODEL", "link": link}],
                "outputs": [{**before["outputs"][0], "links": moved}]}
        node["properties"].pop("models", None)
        for one in moved or ():
            self._set(self._link(one), "origin_id", name)
        before["outputs"][0] = {**before["outputs"][0], "links": [link]}
        fields = (link, before["id"], 0, name, 0, "MODEL")
        as_list = not self.graph["links"] or isinstance(self.graph["links"][0], list)
        self.graph["links"].append(list(fields) if as_list else dict(zip(_FIELDS, fields, strict=True)))
        self.graph["nodes"].append(node)
        return node

    def _next(self, what: str) -> int:
        """A free id, noted where the format keeps the last one."""
        used = [int(item["id"]) for item in self.graph["nodes"]] if what == "node" \
            else [int(self._get(link, "id")) for link in self.graph["links"]]
        state, key = self.graph.get("state"), f"last{what.title()}Id"
        last = max([*used, self.graph.get(f"last_{what}_id") or 0, (state or {}).get(key) or 0]) + 1
        if isinstance(state, dict):
            state[key] = last
        if state is None or f"last_{what}_id" in self.graph:
            self.graph[f"last_{what}_id"] = last
        return int(last)

    def _proxies(self, node: Item, to: Conversion) -> None:
        """Widgets that a subgraph's wrappers show of an inner node, under their new names."""
        for graph in self.outer:
            for wrapper in graph["nodes"]:
                shown = (wrapper.get("properties") or {}).get("proxyWidgets")
                if wrapper.get("type") == self.graph.get("id") and isinstance(shown, list):
                    wrapper["properties"]["proxyWidgets"] = [
                        [one[0], to.renamed.get(one[1], one[1]), *one[2:]] if str(one[0]) == str(node["id"]) else one
                        for one in shown if str(one[0]) != str(node["id"]) or one[1] in to.renamed]

    def remove(self, node: Item) -> None:
        for socket in node.get("inputs") or ():
            if socket.get("link") is not None:
                self._cut(socket["link"])
        self.graph["nodes"].remove(node)

    def _cut(self, link: Any) -> None:
        """Take a link out, where it is listed, too."""
        self.graph["links"].remove(self._link(link))
        for node in self.graph["nodes"]:
            for output in node.get("outputs") or ():
                if link in (output.get("links") or ()):
                    output["links"] = [one for one in output["links"] if one != link]
        for border in (*(self.graph.get("inputs") or ()), *(self.graph.get("outputs") or ())):
            if link in (border.get("linkIds") or ()):
                border["linkIds"] = [one for one in border["linkIds"] if one != link]

    def _link(self, name: Any) -> Any:
        for link in self.graph["links"]:
            if self._get(link, "id") == name:
                return link
        raise KeyError(Text("there is no link {name}", name=name))

    @staticmethod
    def _get(link: Any, what: str) -> Any:
        return link[_FIELDS.index(what)] if isinstance(link, list) else link[what]

    @staticmethod
    def _set(link: Any, what: str, value: Any) -> None:
        if isinstance(link, list):
            link[_FIELDS.index(what)] = value
        else:
            link[what] = value


_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # of a link in a list

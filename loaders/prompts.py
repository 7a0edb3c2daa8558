"""What the nodes of a prompt refer to.

A prompt is the API's: node id -> {"class_type", "inputs"}, where a list of two is a link [node id, number of output].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .files.places import cleaned
from .queries import NODES, Query

BASE, OVERRIDE = "QT_LoadBaseModel", "QT_ApplyTransformerOverride"
# ComfyUI's own loaders of a MODEL, and the input that names the file.
HOST_LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}


def prompt_in(workflow: Mapping[str, Any]) -> dict[str, Any] | None:
    """The prompt of what the page exports for the API, or of the body of a POST to /prompt; None for anything else."""
    prompt = workflow.get("prompt", workflow)
    found = isinstance(prompt, dict) and prompt and all(isinstance(node, dict) and "class_type" in node
                                                        for node in prompt.values())
    return prompt if found else None


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
    base, component = base_of(prompt, node)
    return replace(query, base=base, base_component=component)


def base_of(prompt: Prompt, node: str) -> tuple[str, str]:
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

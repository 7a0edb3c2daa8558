"""What a workflow asks of a worker: its references, and by which models its jobs belong to one worker."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ...loaders.components import overrides
from ...loaders.download_plans import override
from ...loaders.errors import CheckpointError
from ...loaders.files.places import cleaned
from ...loaders.prompts import OVERRIDE, Prompt, base_of, question
from ...loaders.queries import TEXT_ENCODER, locate_parts
from .asked import Asked, listed, lora, read, refused
from .loaders import LORA, QUERIED, READ, SERVER, STOCK, outputs, referring

_INSPECT = "QT_InspectCheckpoint"
_CHOOSE = ("weights_name", "precision", "rank")  # one file of several
_SERVED = (("base_model", "reference"), ("override", "override_reference"), ("", "transformer_2"))
Row = tuple[str, str, str, str, str]


class Workflow:
    """A workflow as the API's prompt, which graphs.prompt_of makes of either format."""

    def __init__(self, prompt: Mapping[str, Any]) -> None:
        self.prompt = Prompt(prompt, referring(), outputs)

    def asked(self) -> list[Asked]:
        """Every reference, node by node."""
        return [one for node in self.prompt.nodes for one in self._of(node)]

    def affinity(self) -> str:
        """12 hex digits, the same for prompts that need the same models, whatever else is in them."""
        rows = sorted({row for node in self.prompt.nodes for row in self._models(node)})
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def _text(self, node: str, name: str) -> str:
        value = self.prompt.value(node, name)
        return cleaned(value) if isinstance(value, str) else ""

    def _chosen(self, node: str, of_list: str, free: str) -> tuple[str, str]:
        """(input, reference): the free one where there is one, else the list's."""
        first = self._text(node, free) or self.prompt.linked(node, free)
        name = free if first else of_list
        return name, self._text(node, name)

    def _unless_linked(self, one: Asked) -> Asked:
        """The same, or without a load where it comes by a link."""
        return replace(one, load=None) if self.prompt.linked(one.node, one.input) else one

    def _of(self, node: str) -> Iterator[Asked]:
        kind = self.prompt.type_of(node)
        if kind in QUERIED:
            yield from self._queried(node, kind)
        elif kind == SERVER:
            for of_list, free in _SERVED:
                name, reference = self._chosen(node, of_list, free)
                if reference not in ("", overrides.NONE):
                    yield Asked(node, kind, name, reference, free if free == "transformer_2" else "")
        elif kind == LORA:
            name, reference = self._chosen(node, "lora", "path")
            yield self._unless_linked(Asked(node, kind, name, reference, load=lora(reference)))
        elif kind in STOCK:
            for name, folder in STOCK[kind].files.items():
                reference = str(self.prompt.value(node, name) or "")
                if folder != "vae" or not reference or os.path.splitext(reference)[1]:  # else ComfyUI's own: taesd
                    yield self._unless_linked(Asked(node, kind, name, reference, load=listed(folder, reference)))
        for name in READ.get(kind, ()):
            if (reference := self._text(node, name)) or self.prompt.linked(node, name):
                yield self._unless_linked(Asked(node, kind, name, reference, load=read(reference)))

    def _queried(self, node: str, kind: str) -> Iterator[Asked]:
        parts = list(self._parts(node, kind))
        name, reference = self._chosen(node, QUERIED[kind][0], "reference")
        one = Asked(node, kind, name, reference, self._component(node, kind),
                    parts=tuple(part.reference for part in parts if part.load))
        try:
            query = question(self.prompt, node)
        except CheckpointError as error:
            yield replace(one, load=refused(error))
        else:
            yield one if query is None else replace(one, load=partial(locate_parts, query), fetched=True)
        yield from parts

    def _parts(self, node: str, kind: str) -> Iterator[Asked]:
        """What takes the place of a base's text encoders."""
        for of_list in overrides.LISTS if kind == TEXT_ENCODER else ():
            name, reference = self._chosen(node, of_list, f"{of_list}_reference")
            if reference not in ("", overrides.NONE) or self.prompt.linked(node, name):
                yield self._unless_linked(Asked(node, kind, name, reference, load=partial(override, reference),
                                                fetched=True))

    def _component(self, node: str, kind: str) -> str:
        """Of which transformer it is; an override's is its base's."""
        if kind == OVERRIDE:
            return base_of(self.prompt, node)[1]
        return str(self.prompt.value(node, "component") or "transformer") if "component" in QUERIED[kind] else ""

    def _models(self, node: str) -> Iterator[Row]:
        """(class, base, override, component, revision) of each model that a node loads."""
        kind = self.prompt.type_of(node)
        if kind in STOCK and STOCK[kind].model:
            for name in STOCK[kind].files:
                yield kind, _same(str(self.prompt.value(node, name) or "")), "", "", ""
        elif kind == SERVER:
            found = {free: _same(self._chosen(node, of_list, free)[1]) for of_list, free in _SERVED}
            above = [f"{free}={found[free]}" for _, free in _SERVED[1:] if found[free] not in ("", overrides.NONE)]
            yield kind, found["reference"], "+".join(above), "", self._text(node, "revision")
        elif kind in QUERIED and kind != _INSPECT:
            main, *others = (_same(one.reference) for one in self._of(node))
            said = ((name, self.prompt.value(node, name)) for name in _CHOOSE if not self.prompt.linked(node, name))
            choice = "".join(f"#{name}={value}" for name, value in said if value not in (None, "", "auto", 0))
            base, above = (_same(base_of(self.prompt, node)[0]), [main]) if kind == OVERRIDE else (main, sorted(others))
            yield kind, base, "+".join(above) + choice, self._component(node, kind), self._text(node, "revision")


def _same(reference: str) -> str:
    """A reference as every spelling of it."""
    return cleaned(reference).replace("\\", "/").rstrip("/")

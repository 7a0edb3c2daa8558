"""What *Run on server* puts into a graph in the place of loaders: the base that a server starts with, the command that
starts it, and what it makes. Read in the helper (answers.py), from the same folders as all that routes read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..engines.sglang import known
from ..engines.sglang.references import KINDS
from ..engines.sglang.wanted import wanted
from ..host.texts import Text
from ..loaders.errors import CheckpointError
from ..loaders.files.places import cleaned
from ..loaders.files.selection import PIPELINE
from ..loaders.locate import base_of_quantized
from ..views.confine import confined
from ..views.variants import base_of

INPUTS = ("base", "near", "override", "override_2", "kind", "weights_name", "revision")


def served(values: Mapping[str, str]) -> dict[str, Any]:
    """{"base", "pipeline" (its class, "" where it is not known), "makes" "image" | "video", "distilled" (whether its
    guidance is an input of the model), "command"}, for INPUTS: references and choices as loaders have them. `near` is a
    base that the same graph has, for an override that needs none to load.

    Raises CheckpointError: no base, or a reference that can mean nothing; OutsideError as all routes.
    """
    given = {name: cleaned(values.get(name, "")) for name in INPUTS}
    kind = given["kind"] or KINDS[0]
    if kind not in KINDS:
        raise CheckpointError(Text("{name} is none of {allowed}", name="kind", allowed=", ".join(KINDS)),
                              repr(kind[:80]), Text("correct it"))
    override = given["override"]
    base = given["base"] or override and (base_of_quantized(override) or base_of(override) or given["near"])
    if not base:
        raise CheckpointError(Text("a server needs the base of this, and its name does not say which"), override,
                              Text("load the base's text encoder in the same graph"))
    places = confined(base, given["revision"])
    for reference, name in ((override, given["weights_name"]), (given["override_2"], "")):
        if reference:
            confined(reference, "", name)
    found = wanted("", base, override, given["override_2"], kind, given["weights_name"], given["revision"])
    pipeline = next(filter(None, map(_class_in, places.paths)), "")
    name = base_of_quantized(base) or base
    if not pipeline:  # not here: by the name that its model is known by
        pipeline = next((kind for kind, model in known.BY_CLASS.items() if model == name.rpartition("/")[2]), "")
    video = known.is_video(pipeline or name.rpartition("/")[2])
    return {"base": base, "pipeline": pipeline, "makes": "video" if video else "image",
            "distilled": pipeline in known.DISTILLED, "command": found.command}


def _class_in(folder: Any) -> str:
    """Of the pipeline in a folder; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        return str(json.loads((folder / PIPELINE).read_text(encoding="utf-8")).get("_class_name") or "")
    return ""

"""What was found of a workflow's references, as text."""

from __future__ import annotations

from collections.abc import Sequence

from ...host.texts import Text
from ...loaders.words import first_ten, size
from .found import HUB, SERVED, Reference, bytes_missing


def lines(found: Sequence[Reference], affinity: str) -> list[str]:
    """One line for each reference, more for what is missing, and the sum."""
    said = [line for one in found for line in _lines(one)]
    missing = [one for one in found if one.missing]
    if not found:
        said.append(Text("this workflow names no model"))
    elif missing and all(one.sizes for one in missing):
        said.append(Text("{missing} of {count} references are not here: {bytes}", missing=len(missing),
                         count=len(found), bytes=size(bytes_missing(found))))
    elif missing:
        said.append(Text("{missing} of {count} references are not here: {bytes}, and what has no size",
                         missing=len(missing), count=len(found), bytes=size(bytes_missing(found))))
    else:
        said.append(Text("{count} references, nothing is missing", count=len(found)))
    return [*said, Text("affinity: {key}", key=affinity)]


def _lines(one: Reference) -> list[str]:
    asked = one.asked
    reference = f"{asked.reference} ({asked.component})" if asked.component else asked.reference
    state: str = one.path or "?"
    if one.where == SERVED:
        state = Text("on its server")
    elif one.missing and one.where == HUB and one.sizes:
        state = Text("MISSING, {bytes}: {files}", bytes=size(sum(one.sizes.values())), files=first_ten(one.missing))
    elif one.missing:
        state = Text("MISSING")
    found: list[str] = [Text("node {node} {kind}, {input}: {reference}\n  {state}", node=asked.node, kind=asked.kind,
                             input=asked.input, reference=reference, state=state)]
    if one.problem:
        found.append(Text("  {problem}", problem=one.problem))
    if one.licence:
        found.append(Text("  gated, its licence: {page}", page=one.licence))
    return found

"""Descriptions as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import host
from ..host.texts import Text, both, joined
from .description import CheckpointDescription
from .words import grouped, size

if TYPE_CHECKING:
    from .assemble import NativeStateDict

def _head(description: CheckpointDescription) -> list[str]:
    family = Text("not quantized") if description.family == "none" else description.family
    if description.producer:
        family = Text("{family} (by {producer})", family=family, producer=description.producer)
    dims = description.dims
    lines: list[str] = [Text("{architecture} · {family}", architecture=description.architecture, family=family),
                        Text("source: {reference}", reference=description.reference)]
    if description.files:
        names = description.files[0] if len(description.files) == 1 else \
            Text("{count} shards", count=len(description.files))
        lines.append(Text("files: {names}, {size}, {style} names", names=names, size=size(description.bytes_on_disk),
                          style=Text("native") if description.naming.style == "native" else description.naming.style))
    lines.append(Text("sizes: {sizes}", sizes=", ".join(f"{key} {value}" for key, value in dims.items())))
    if description.ranks:
        lines.append(Text("low rank: {ranks}", ranks=both(map(str, description.ranks))))
    if description.formats:
        lines.append(Text("layers: {layers}",
                          layers=joined(", ", (Text("{count} {format}", count=count, format=name)
                                               for name, count in description.formats.items()))))
    return lines


def describe_report(description: CheckpointDescription) -> str:
    """What Inspect shows: the description, notes, and problems that would refuse a load."""
    lines = _head(description)
    if description.static_activations or description.dynamic_activations:
        lines.append(Text("activation scales: {static} static, {dynamic} dynamic",
                          static=description.static_activations, dynamic=description.dynamic_activations))
    if description.declared_in:
        lines.append(Text("declared in: {places}", places=joined(", ", description.declared_in)))
    lines += [Text("note: {note}", note=note) for note in description.notes]
    lines += [Text("PROBLEM: {problem}", problem=problem) for problem in grouped(description.problems)]
    lines.append(Text("this checkpoint loads") if not description.problems else Text("this checkpoint is refused"))
    return joined("\n", lines)


def load_report(description: CheckpointDescription, native: NativeStateDict | None) -> str:
    """What a loader node reports: the description, how the modules ended up, and how they run on this device."""
    lines = _head(description)
    if native is not None and native.layouts:
        total = sum(native.layouts.values())
        lines.append(Text("quantized modules in ComfyUI: {total}, of them {joined} of several tiles with their own "
                          "scale, {dynamic} with dynamic activation scales", total=total, joined=native.joined,
                          dynamic=native.dynamic))
    lines += native.runs if native is not None else []
    lines += [Text("note: {note}", note=note)
              for note in (*description.notes, *(native.notes if native else ()), *host.found_lacks)]
    return joined("\n", lines)

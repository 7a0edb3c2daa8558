"""Descriptions as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import host
from .description import CheckpointDescription
from .words import grouped, size

if TYPE_CHECKING:
    from .assemble import NativeStateDict

def _head(description: CheckpointDescription) -> list[str]:
    family = "not quantized" if description.family == "none" else description.family
    if description.producer:
        family += f" (by {description.producer})"
    dims = description.dims
    lines = [f"{description.architecture} · {family}", f"source: {description.reference}"]
    if description.files:
        names = description.files[0] if len(description.files) == 1 else f"{len(description.files)} shards"
        lines.append(f"files: {names}, {size(description.bytes_on_disk)}, {description.naming.style} names")
    lines.append("sizes: " + ", ".join(f"{key} {value}" for key, value in dims.items()))
    if description.ranks:
        lines.append(f"low rank: {' and '.join(map(str, description.ranks))}")
    if description.formats:
        lines.append("layers: " + ", ".join(f"{count} {name}" for name, count in description.formats.items()))
    return lines


def describe_report(description: CheckpointDescription) -> str:
    """What Inspect shows: the description, notes, and problems that would refuse a load."""
    lines = _head(description)
    if description.static_activations or description.dynamic_activations:
        lines.append(f"activation scales: {description.static_activations} static, "
                     f"{description.dynamic_activations} dynamic")
    if description.declared_in:
        lines.append(f"declared in: {', '.join(description.declared_in)}")
    lines += [f"note: {note}" for note in description.notes]
    lines += [f"PROBLEM: {problem}" for problem in grouped(description.problems)]
    lines.append("this checkpoint loads" if not description.problems else "this checkpoint is refused")
    return "\n".join(lines)


def load_report(description: CheckpointDescription, native: NativeStateDict | None) -> str:
    """What a loader node reports: the description, how the modules ended up, and how they run on this device."""
    lines = _head(description)
    if native is not None and native.layouts:
        total = sum(native.layouts.values())
        lines.append(f"quantized modules in ComfyUI: {total}, of them {native.joined} of several tiles with their own "
                     f"scale, {native.dynamic} with dynamic activation scales")
    lines += native.runs if native is not None else []
    lines += [f"note: {note}" for note in (*description.notes, *(native.notes if native else ()), *host.found_lacks)]
    return "\n".join(lines)

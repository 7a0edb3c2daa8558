"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable


def size(count: int) -> str:
    """A number of bytes as GB, MB or kB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def grouped(lines: Iterable[str]) -> list[str]:
    """Lines of the form "layer: text", those that say the same of several layers as one, with how many and the first
    ten; other lines as they are."""
    layers: dict[str, list[str]] = {}
    for line in lines:
        layer, colon, text = line.partition(": ")
        layers.setdefault(text if colon and " " not in layer else line, []).append(layer)
    return [f"{text}: {len(names)} layers ({first_ten(names)})" if len(names) > 1 else
            text if text.partition(": ")[0] == names[0] else f"{names[0]}: {text}" for text, names in layers.items()]


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"

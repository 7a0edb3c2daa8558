"""Numbers and lists as text."""

from __future__ import annotations

import re
from collections.abc import Iterable


def size(count: int) -> str:
    """A number of bytes as GB, MB or kB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def grouped(lines: Iterable[str]) -> list[str]:
    """Lines that begin with a layer's or tensor's name ("a.b: text", "a.b is text", "a.b (text"): those that say the
    same of several as one, with how many and the first ten; other lines as they are."""
    same: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        found = _OF_ONE.match(line)
        name, text = found.groups() if found else ("", line)
        same.setdefault(text, []).append((name, line))
    return [found[0][1] if len(found) == 1 else f"{text}: {_counted([name for name, _ in found])}"
            for text, found in same.items()]


def _counted(names: list[str]) -> str:
    what = "tensors" if names[0].endswith((".weight", ".bias")) else "layers"
    return f"{len(names)} {what} ({first_ten(names)})"


_OF_ONE = re.compile(r"(\S+?)(?:: | is | (?=\())(.+)", re.DOTALL)


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"

"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable


def size(count: int) -> str:
    """A number of bytes as GB, MB or kB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, and {len(names) - 10} more"

"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable

from ..host.texts import Text, joined


def size(count: int) -> str:
    """A number of bytes in the unit that fits: TB, GB, MB or kB (powers of ten), or B."""
    for unit, factor, digits in (("TB", 1e12, 2), ("GB", 1e9, 2), ("MB", 1e6, 2), ("kB", 1e3, 1)):
        if round(count / factor, 4) >= 1:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count} B"


def grouped(lines: Iterable[str]) -> list[str]:
    """Lines that begin with the name of a layer or tensor ("{name}: it is stored as U8"): of those that say the same of
    several, the first, with how many others and the first ten of them. Other lines as they are."""
    same: dict[object, list[Text]] = {}
    for line in lines:
        key: object = line
        if isinstance(line, Text) and line.template.startswith("{"):
            first = _first(line)
            key = line.template, *((name, value) for name, value in line.values.items() if name != first)
        same.setdefault(key, []).append(line if isinstance(line, Text) else Text("{line}", line=line))
    return [found[0] if len(set(found)) == 1 else _several(found) for found in same.values()]


def _first(line: Text) -> str:
    return line.template[1:line.template.index("}")]


def _several(lines: list[Text]) -> Text:
    names = [line.values[_first(line)] for line in lines[1:]]
    if names[0].endswith((".weight", ".bias")):
        return Text("{line}; the same of {count} more tensors: {names}", line=lines[0], count=len(names),
                    names=first_ten(names))
    return Text("{line}; the same of {count} more layers: {names}", line=lines[0], count=len(names),
                names=first_ten(names))


def first_ten(names: Iterable[str]) -> str:
    """The first ten names as one line, with how many more there are."""
    names = list(names)
    shown = joined(", ", names[:10])
    return shown if len(names) <= 10 else Text("{shown}, and {count} more", shown=shown, count=len(names) - 10)

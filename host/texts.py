"""What a user reads, in more than one language.

A sentence is written where it is said, in English, as gettext has it: Text("{name} has no weights", name=name). It is
an ordinary str, and keeps its template and values, by which `said` says it again in another language: that of the
page that asked, of the page whose prompt runs, or QT_LANG's. The templates of a language are those of
locales/<language>/messages/*.json, English -> translated; a placeholder that a language has no use for (the plural's
{s}) may be left out, and what has no translation stays English.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import cache, reduce
from pathlib import Path
from typing import Any

ENGLISH = "en"
LOCALES = Path(__file__).resolve().parents[1] / "locales"
asked: ContextVar[str] = ContextVar("language", default="")  # of the request that is answered
_FORMAT = string.Formatter()


class Text(str):
    """A sentence in English. `values` are what its template was filled with, as text: each a str, or a Text."""

    template: str
    values: dict[str, str]

    def __new__(cls, template: str, /, **values: Any) -> Text:
        return _again(template, {name: _filled(values[name], conversion, spec or "")
                                 for _, name, spec, conversion in _FORMAT.parse(template) if name is not None})

    def __reduce__(self) -> Any:
        return _again, (self.template, self.values)


def _again(template: str, values: dict[str, str]) -> Text:
    """A text whose values are text already."""
    text = str.__new__(Text, _put(template, values))
    text.template, text.values = template, values
    return text


def _put(template: str, values: Mapping[str, str]) -> str:
    return "".join(literal + (values[name] if name is not None else "")
                   for literal, name, _, _ in _FORMAT.parse(template))


def _filled(value: Any, conversion: str | None, spec: str) -> str:
    if isinstance(value, Exception):
        says = getattr(value, "text", value.args[0] if value.args else "")
        value = says if isinstance(says, Text) else value
    if isinstance(value, Text) and not conversion and not spec:
        return value
    return format(_FORMAT.convert_field(value, conversion), spec)


def joined(separator: str, texts: Iterable[str]) -> Text:
    """Several sentences, or parts of one, as one."""
    values = {f"text{number}": text for number, text in enumerate(texts)}
    return Text(separator.replace("{", "{{").replace("}", "}}").join(f"{{{name}}}" for name in values), **values)


def either(names: Iterable[str]) -> str:
    """At least one name: "a or b"."""
    return reduce(lambda first, second: Text("{first} or {second}", first=first, second=second), names)


def both(names: Iterable[str]) -> str:
    """At least one name: "a and b"."""
    return reduce(lambda first, second: Text("{first} and {second}", first=first, second=second), names)


def said(text: str, language: str | None = None) -> str:
    """The text in a language, by default that of whoever is going to read it, as an ordinary str."""
    language = spoken() if language is None else language
    if not isinstance(text, Text) or language == ENGLISH:
        return str.__str__(text)
    template = templates(language).get(text.template, text.template)
    return _put(template, {name: said(value, language) for name, value in text.values.items()})


def one_line(text: str) -> str:
    """What `said` says, with every run of white space as one space."""
    return " ".join(said(text).split())


def spoken() -> str:
    """The language of whoever is going to read what is said now."""
    from .server import language_of_run

    return asked.get() or language_of_run() or usual()


def usual() -> str:
    """The language for whoever does not say one."""
    return chosen([os.environ.get("QT_LANG", "")])


def chosen(wanted: Iterable[str]) -> str:
    """The first of the wanted languages that there is, else English."""
    return next((one for one in wanted if one == ENGLISH or templates(one)), ENGLISH)


@cache
def templates(language: str) -> dict[str, str]:
    """English template -> the language's; empty for a language that there is none of."""
    if not language.isalpha():
        return {}
    found: dict[str, str] = {}
    for path in sorted((LOCALES / language / "messages").glob("*.json")):
        found |= json.loads(path.read_text("utf-8"))
    return found


def brief(text: str, most: int = 1000) -> str:
    """The text with each of the values in it cut to so many characters: they may be what a file says."""
    if len(text) <= most:
        return text
    if isinstance(text, Text):
        return _again(text.template, {name: brief(value, most) for name, value in text.values.items()})
    return f"{text[:most]}..."


def each(value: Any, change: Callable[[str], Any]) -> Any:
    """A JSON-able value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: each(one, change) for key, one in value.items()}
    return [each(one, change) for one in value] if isinstance(value, (list, tuple)) else value


def packed(value: Any) -> Any:
    """A JSON-able value whose texts survive JSON: `unpacked`, as json's object_hook, makes them again."""
    return each(value, lambda text: {_PACKED: text.template, "values": packed(text.values)}
                if isinstance(text, Text) else text)


def unpacked(value: dict[str, Any]) -> Any:
    """See `packed`."""
    return _again(value[_PACKED], value["values"]) if _PACKED in value else value


_PACKED = "\0text"

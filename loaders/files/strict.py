"""The one door for JSON that others wrote: files, headers, metadata, answers of hubs, bodies of requests.

RFC 8259 leaves much open that a reader must decide. Here: UTF-8 without a byte order mark; no key twice in an object;
no NaN, Infinity, or number beyond a double's or a 64-bit integer's range; and bounded before it is parsed, so that the
time and the memory that it takes do not depend on who wrote it (docs/limits.md, "What is bounded").
"""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isinf
from typing import Any

from ...host.texts import Text
from ..errors import CheckpointError
from ..words import first_ten, size

LARGEST = 16_000_000  # bytes; published configurations and indexes stay below 1 MB
# Values in it, taken as the commas and opening brackets. An index or a header of 50,000 tensors has fewer; a published
# one has at most 7,000 tensors.
MOST = 500_000
NESTED = 64  # objects and lists within each other; published: 6
_HALF = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # of a pair, which may be whole
_LONGEST = 40  # characters of an integer; transformers writes 1e30 for "no limit"
AGAIN = Text("download the file again")


class Invalid(ValueError):
    """What is wrong with it, as a Text."""


def decode(data: bytes | str, *, largest: int = LARGEST, most: int = MOST,
           pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text of at most `largest` bytes (or characters) and `most` values.

    `pairs` makes what stands for an object of its keys and values, in place of a dict, and may raise Invalid. Raises
    Invalid for what is too large, and for whatever the top of this module says is refused.
    """
    if len(data) > largest:
        raise Invalid(Text("it takes {size}, and no more than {limit} are read", size=size(len(data)),
                           limit=size(largest)))
    text = _text(data) if isinstance(data, bytes) else data
    if text.startswith("\ufeff"):
        raise Invalid(Text("it begins with a byte order mark"))
    brackets = text.count("{") + text.count("[")
    if brackets + text.count(",") > most:
        raise Invalid(Text("it holds more than {most:,} values", most=most))
    try:
        with _uncollected():
            value = json.loads(text, object_pairs_hook=pairs or _object, parse_constant=_constant, parse_float=_float,
                               parse_int=None if pairs else _integer)
    except Invalid:
        raise
    except json.JSONDecodeError as error:
        raise Invalid(Text("{error}", error=error)) from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # an integer of thousands of digits
        raise Invalid(Text("a number in it is too large")) from error
    if brackets > NESTED and pairs is None:
        _check_depth(value)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise Invalid(Text("a text in it has half of a character")) from error
    return value


def parse(data: bytes | str, where: object, do: str = AGAIN, *, largest: int = LARGEST, most: int = MOST) -> Any:
    """As `decode`, with its refusal as a CheckpointError that says `where` the text is and what to do."""
    try:
        return decode(data, largest=largest, most=most)
    except Invalid as error:
        raise CheckpointError(Text("invalid JSON: {error}", error=error), where, do) from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: nothing in JSON refers back, and what is made by the thousand has it look through all
    of ComfyUI's objects, again and again, and hold the interpreter for that (a header of 40,000 tensors: 280 ms in one
    piece, and 10 without)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:  # of several threads the first has found it on
            gc.enable()


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(Text("byte {position:,} of it is no UTF-8 text", position=error.start)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid(twice(pairs))
    return found


def twice(pairs: list[tuple[str, Any]]) -> Text:
    """Which keys are there more than once."""
    again = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return Text("duplicate keys: {keys}", keys=first_ten(name[:100] for name in again))


def _constant(word: str) -> Any:
    raise Invalid(Text("{word} is no number in JSON", word=word))


def _float(digits: str) -> float:
    value = float(digits)
    if isinf(value):
        raise Invalid(Text("the number {digits} is too large", digits=digits[:40]))
    return value


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST:
        raise Invalid(Text("the number {digits} is too large", digits=f"{digits[:40]}..."))
    return int(digits)


def _too_deep() -> Invalid:
    return Invalid(Text("its objects and lists are nested more than {most} deep", most=NESTED))


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(NESTED):
        level = [one for box in level for one in (box.values() if isinstance(box, dict) else box)
                 if isinstance(one, (dict, list))]
        if not level:
            return
    raise _too_deep()

"""Names that a pattern of somebody else's covers: globs of ignore lists, and regular expressions, in bounded time.

`re` tries every way to divide a name among the stars of a pattern, so that `****...*x` takes for ever, and holds the
interpreter lock meanwhile. Globs are read as Python's fnmatch reads them, whose expressions never go back; for
expressions that others wrote there is `regex` (ComfyUI has it with transformers), which can be told when to stop.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from fnmatch import translate
from typing import Any

from ..host.texts import Text
from .errors import CheckpointError

# Characters of a pattern, and of all: ModelOpt's list for SD3.5 has one of 2500, with all names of a kind.
LONGEST, TOGETHER = 8000, 400_000
MANY = 4096  # patterns; published lists have 200
MOST = 4_000_000  # comparisons of a name with a pattern that has stars; published lists need 400,000
DO = Text("download it again, or report it to its publisher")
SECONDS = 2.0  # for all names that one checkpoint's expressions are held against


def glob(pattern: str) -> re.Pattern[str]:
    """A pattern as ModelOpt's ignore lists have them, for `fullmatch`: `*` is any text, dots among it."""
    return re.compile(translate(pattern.replace("[", "[[]").replace("?", "[?]")))


class Globs:
    """Patterns of an ignore list as one. Raises CheckpointError for one that is too long."""

    def __init__(self, patterns: Sequence[str], where: object = "") -> None:
        self._names = {pattern for pattern in patterns if "*" not in pattern}
        self._where = where
        stars = dict.fromkeys(pattern for pattern in patterns if "*" in pattern)
        refuse_many(len(stars), 1, where)
        refuse_long(stars, where)
        self._stars = [glob(pattern) for pattern in stars]

    def covers(self, name: str) -> bool:
        """Whether one of them is the whole name."""
        return name in self._names or any(pattern.match(name) for pattern in self._stars)

    def among(self, names: Collection[str]) -> list[str]:
        """Those of the names that are covered. Raises CheckpointError where that would take long."""
        refuse_many(len(self._stars), len(names), self._where)
        return [name for name in names if self.covers(name)]


def refuse_many(patterns: int, names: int, where: object) -> None:
    """Raise CheckpointError where comparing each with each would take long."""
    if patterns > MANY or patterns * names > MOST:
        raise CheckpointError(Text("a list of {patterns:,} patterns for {names:,} layers is not read",
                                   patterns=patterns, names=names), where, DO)


def refuse_long(patterns: Collection[str], where: object) -> None:
    """Raise CheckpointError for a pattern that no writer makes, and for too much of them."""
    total = sum(map(len, patterns))
    if total > TOGETHER:
        raise CheckpointError(Text("a list of patterns of {length:,} characters", length=total), where, DO)
    long = next((pattern for pattern in patterns if len(pattern) > LONGEST), None)
    if long is not None:
        raise CheckpointError(Text("a pattern of {length:,} characters begins with {start!r}", length=len(long),
                                   start=long[:40]), where, DO)


class Expressions:
    """Regular expressions that others wrote, as Python's `re` has them; all together may take SECONDS."""

    def __init__(self, where: object = "", do: str = DO) -> None:
        self._where, self._do, self._left = where, do, SECONDS

    def compile(self, pattern: str) -> Expression:
        """One of them. Raises re.error for none of Python's, CheckpointError for one that is too long."""
        import regex

        refuse_long([pattern], self._where)
        try:
            re.compile(pattern)  # what `regex` alone understands is none of Python's
            return Expression(pattern, regex.compile(pattern), self)
        except (regex.error, RecursionError, OverflowError) as error:
            raise re.error(str(error)) from error

    def run(self, expression: Expression, search: Any, name: str) -> bool:
        """What `search` finds in a name, as long as there is time. Raises CheckpointError when it is over."""
        begun = time.perf_counter()
        try:
            if self._left > 0:
                return search(name, timeout=self._left) is not None
        except (TimeoutError, MemoryError):
            self._left = 0
        finally:
            self._left -= time.perf_counter() - begun
        raise CheckpointError(Text("the pattern {pattern!r} takes too long to compare with names",
                                   pattern=expression.pattern[:80]), self._where, self._do)


class Expression:
    """One regular expression; see Expressions."""

    def __init__(self, pattern: str, compiled: Any, all_of_them: Expressions) -> None:
        self.pattern, self._compiled, self._all = pattern, compiled, all_of_them

    def match(self, name: str) -> bool:
        """Whether the name begins with what it means."""
        return self._all.run(self, self._compiled.match, name)

    def search(self, name: str) -> bool:
        """Whether it is anywhere in the name."""
        return self._all.run(self, self._compiled.search, name)

"""Source files that must stay as they are while something is made from them: what they were, and whether they still
are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ...host.texts import Text
from ..errors import CheckpointError


class Changed(CheckpointError):  # noqa: N818  # as those in errors.py
    """A source file is not what it was."""

    def __init__(self, path: str, how: str, at: str = "", loaded: bool = False) -> None:
        """`how` it is another; `at`: where this was seen; `loaded`: a MODEL holds what it was."""
        what = Text("the source file changed meanwhile (at {name}): {how}", name=at, how=how) if at else \
            Text("the source file changed meanwhile: {how}", how=how)
        super().__init__(what, path, Text("load the model again when nothing writes to it") if loaded else
                         Text("run this again when nothing writes to it"))


class State(NamedTuple):
    """What tells one content of a file from another: bytes, time of the last change (ns), inode."""

    size: int
    changed: int
    inode: int


class Frozen:
    """Files (links followed) as they were before anything was read of them.

    `in_place`: they are behind a mapping, which keeps what is removed or replaced by name; only what is written into
    them changes it.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = (), in_place: bool = False) -> None:
        """Raises CheckpointError for a file that cannot be read."""
        self.in_place = in_place
        self.states: dict[str, State] = {}
        for path in paths:
            self.add(path)

    def add(self, path: str | os.PathLike[str]) -> int:
        """Freeze one more file, if it is not yet; how many bytes it had when it was. Raises as `Frozen` does."""
        name = os.fspath(path)
        if name not in self.states:
            try:
                self.states[name] = _state(name)
            except OSError as error:
                raise CheckpointError(Text("cannot read the file: {reason}", reason=error.strerror), name,
                                      Text("check the path and its rights")) from error
        return self.states[name].size

    def __or__(self, other: Frozen) -> Frozen:
        """Both, each file as it was for the one that has it; for this one, if both do."""
        both = Frozen(in_place=self.in_place)
        both.states = {**other.states, **self.states}
        return both

    def behind(self, endings: tuple[str, ...]) -> Frozen:
        """Those whose names end so, as files behind a mapping."""
        found = Frozen(in_place=True)
        found.states = {path: state for path, state in self.states.items() if path.lower().endswith(endings)}
        return found

    def check(self, at: str = "") -> None:
        """Raise Changed unless every file is as it was; `at` says what is being made."""
        for path, before in self.states.items():
            try:
                now = _state(path)
            except OSError:
                how = "" if self.in_place else Text("it is gone")
            else:
                how = self._difference(before, now)
            if how:
                raise Changed(path, how, at, self.in_place)

    def _difference(self, before: State, now: State) -> str:
        if before.inode != now.inode:
            return "" if self.in_place else Text("another file took its place")
        if before.size != now.size:
            return Text("it has {now:,} bytes, and had {before:,}", now=now.size, before=before.size)
        return Text("it was written to") if before.changed != now.changed else ""

    @contextmanager
    def held(self, at: str = "") -> Iterator[None]:
        """Check before the block, and after an exception of it: that a file changed may be why."""
        self.check(at)
        try:
            yield
        except Changed:
            raise
        except Exception as error:
            try:
                self.check(at)
            except Changed as changed:
                raise changed from error
            raise


def _state(path: str) -> State:
    found = os.stat(path)
    return State(found.st_size, found.st_mtime_ns, found.st_ino)

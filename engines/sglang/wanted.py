"""What a graph wants of a server: which base and overrides it must serve, and with which LoRAs.

A `Server` is the value between the nodes (QT_SERVER): plain, JSON-able, without a secret. It may as well come from a
workflow that somebody wrote by hand, so it is read as strictly as any file, and its address is judged where it is used.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.files import hubs
from ...loaders.files.places import candidates, cleaned, find_path, is_repo
from ...loaders.files.selection import PIPELINE
from ...loaders.locate import base_of_quantized
from .client import State
from .identity import DIGITS, ROLES, SNAPSHOT, Identity, Part, part_of
from .loras import LoRA
from .references import base_of, beside_mixed, files_of, location

CHECKS = ("exact", "base only", "none")
NONE = "none"  # the override of a server that has none
_HEX = set("0123456789abcdef")
PACK = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    """`server` is an address or a name (address.py); `base` and `overrides` (by role) hold the identity.Parts, as text,
    any of which it may serve; `command` starts such a server."""

    server: str
    base: tuple[str, ...]
    overrides: dict[str, tuple[str, ...]]
    check: str = CHECKS[0]
    loras: tuple[LoRA, ...] = ()
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it goes from node to node."""
        return {**asdict(self), "loras": [lora.to_json() for lora in self.loras]}

    @classmethod
    def of_json(cls, value: Any) -> Server:
        """Raises CheckpointError for what no Server Model made."""
        try:
            found = cls(value["server"], tuple(value["base"]),
                        {role: tuple(parts) for role, parts in value["overrides"].items()}, value["check"],
                        tuple(LoRA.of_json(one) for one in value["loras"]), value["command"])
            texts = [found.server, found.command, *found.base, *(one for parts in found.overrides.values()
                                                                 for one in parts)]
            sound = found.check in CHECKS and found.base and all(isinstance(one, str) for one in texts)
        except (TypeError, KeyError, ValueError, AttributeError):
            sound = False
        if not sound or not set(found.overrides) <= set(ROLES):
            raise CheckpointError(Text("this is no server of Server Model"), "", Text("connect that node"))
        return found

    def with_lora(self, lora: LoRA) -> Server:
        return replace(self, loras=(*self.loras, lora))

    @property
    def name(self) -> str:
        """As an identity is written, the first of what it may be."""
        return str(Identity(_read(self.base[0]), tuple((role, _read(parts[0]))
                                                       for role, parts in self.overrides.items())))

    def verify(self, state: State, where: str) -> list[str]:
        """What was verified, as lines for a report. Raises CheckpointError where a server serves something else, or
        does not say what it serves."""
        found = state.identity
        if self.check == "none":
            return [Text("not checked: what it serves ({name})", name=state.name)]
        if self.check == "base only":
            return [self._base_only(state, where)]
        if found is None:
            raise CheckpointError(Text("what this server serves cannot be verified: it is named {name}",
                                       name=state.name[:200]), where,
                                  Text("start it with {command}, or set check to base only", command=self.command))
        theirs = dict(found.overrides)
        if (not _is_one(found.base, self.base) or theirs.keys() != self.overrides.keys()
                or not all(_is_one(part, self.overrides[role]) for role, part in theirs.items())):
            raise CheckpointError(Text("the server serves {found}, and wanted is {wanted}", found=found,
                                       wanted=self.name), where, Text("start one with {command}", command=self.command))
        loose = [str(part) for part, ours in [(found.base, self.base),
                                              *((part, self.overrides[role]) for role, part in theirs.items())]
                 if not part.mark or not any(_read(one).mark for one in ours if _is_one(part, (one,)))]
        return [Text("serves what is wanted: {identity}", identity=found),
                *([Text("of any version: {parts}", parts=", ".join(loose))] if loose else [])]

    def _base_only(self, state: State, where: str) -> str:
        if state.identity:
            right, name = _is_one(state.identity.base, self.base), str(state.identity.base)
        else:  # the folder it was started with: only its name says anything
            part = part_of(Path(state.path or "?"), ())
            name = part.name
            right = any(_read(one).name in (name, name.rpartition("/")[2]) or _read(one).name.rpartition("/")[2] == name
                        for one in self.base)
        if not right:
            raise CheckpointError(Text("the server serves the base {found}, and wanted is {wanted}", found=name,
                                       wanted=self.base[0]), where,
                                  Text("start one with {command}", command=self.command))
        return Text("serves the base that is wanted; what replaces its transformer was not checked: {name}", name=name)


def _read(text: str) -> Part:
    name, _, mark = text.rpartition("@")
    return Part(unquote(name), mark) if name and len(mark) == DIGITS and set(mark) <= _HEX else Part(unquote(text))


def _is_one(part: Part, any_of: tuple[str, ...]) -> bool:
    """Whether a served part may be one of those. A repo id whose files are not here, "owner/name/*", is any of them."""
    for text in any_of:
        ours = _read(text)
        if part.matches(ours):
            return True
        if ours.name.endswith("/*") and f"{part.name}/".startswith(ours.name[:-1]) and (
                not ours.mark or not part.mark or part.mark == ours.mark):
            return True
    return False


def wanted(server: str, base: str, override: str = "", override_2: str = "", kind: str = "auto",
           weights_name: str = "", revision: str = "", check: str = CHECKS[0]) -> Server:
    """A `Server` for references as Apply Override takes them; the base's `revision` too. Nothing is fetched, and
    nothing needs to be here: what is not goes by its repo id. Raises CheckpointError for a reference that can mean
    nothing."""
    base, override, override_2 = cleaned(base), _given(override), _given(override_2)
    command = ["python", str(PACK), "serve", base]
    for flag, value in (("--override", override), ("--override-2", override_2), ("--weights-name", weights_name),
                        ("--kind", "" if kind == "auto" else kind), ("--revision", revision)):
        command += [flag, value] if value else []
    if not override and base_of_quantized(base):  # as `serve` reads quantized weights that are given alone
        base, override, kind = base_of_quantized(base), base, "weights"
    overrides = {role: tuple(map(str, dict.fromkeys(_parts_of_override(given, role, kind, name))))
                 for role, given, name in zip(ROLES, (override, override_2), (weights_name, ""), strict=True) if given}
    return Server(server.strip(), tuple(map(str, dict.fromkeys(_parts_of_base(base, revision)))), overrides, check,
                  command=shlex.join(command))


def _given(reference: str) -> str:
    text = cleaned(reference)
    return "" if text == NONE else text


def _parts_of_base(reference: str, revision: str) -> Iterator[Part]:
    """What a server of this base may call it."""
    for path in candidates(reference, revision):
        if SNAPSHOT.search(path.absolute().as_posix()):
            yield part_of(path, ())
            return
        if (path / PIPELINE).is_file():
            try:
                yield base_of(str(path)).part
            except CheckpointError:  # not whole here: the server's may be
                yield Part(path.absolute().name)
            break
    if is_repo(reference):
        yield _repo(reference, revision)
    elif not (find_path(reference, revision) / PIPELINE).is_file():  # which says, too, when nothing is there
        raise CheckpointError(Text("the base of a server is a whole pipeline"), reference,
                              Text("give a repo id, or a folder with {name}", name=PIPELINE))


def _parts_of_override(reference: str, role: str, kind: str, weights_name: str) -> Iterator[Part]:
    """What a server of this override may call it."""
    try:
        source = location(reference, role, weights_name)
    except CheckpointError:
        if not is_repo(reference):
            raise
        part = _repo(reference, "")
        yield Part(f"{part.name}/{weights_name}" if weights_name else part.name, part.mark)
        if not weights_name:  # which of its files, `serve` finds where they are
            yield Part(f"{part.name}/*", part.mark)
        return
    whole = beside_mixed(source, weights_name)
    for files in (source, *([location(str(whole), role, "")] if whole else [])):
        yield part_of(files_of(files, kind), files.paths)
    if is_repo(reference) and not SNAPSHOT.search(Path(source.folder).absolute().as_posix()):
        yield from (_repo(reference, ""), Part(f"{_repo(reference, '').name}/*"))


def _repo(reference: str, revision: str) -> Part:
    """A repo by its id; by its commit where that is given."""
    _, text = hubs.split(cleaned(reference))
    revision = revision.strip().lower()
    return Part(text, revision[:DIGITS] if len(revision) >= DIGITS and set(revision) <= _HEX else "")

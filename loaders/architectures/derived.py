"""Models of the host's in diffusers' names: tables say what makes each of the host's tensors, the host says the rest.

A table (tables/<name>.json, written by tests/tables.py from diffusers' own converter) has, for every pattern of
the host's names, those of the stored tensors whose rows make it, in order: {0}, {1} are numbers of blocks and {last} is
that of the last; `.*` is any leaf of a module; NAME[1/2:1] the rows from one fraction to another; "!reshape" the same
numbers in another shape. A name that no pattern has is the same on both sides: a table without any is of a class whose
names are the host's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...host.texts import Text, joined
from ..errors import CheckpointError
from . import passthrough
from .base import Dims, Module, Naming
from .passthrough import HostModel

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent / "tables"
WHOLE = passthrough.PREFIXES[0]
_NUMBER = re.compile(r"\d+|\{\w+\}")
_SPLIT = re.compile(r"(.+?)(?:\[([\d/]+):([\d/]+)\])?")


class Companion(NamedTuple):
    """A component of the pipeline that is part of the host's model: `place` is where diffusers has its class, empty for
    what is a configuration alone, which is in the file `config`. `fixed` and `free` as a Derived's; no `free`: whatever
    else it says is fine."""

    place: str = ""
    config: str = "config.json"
    fixed: Mapping[str, tuple[Any, ...]] = {}
    free: frozenset[str] | None = None


class Derived(NamedTuple):
    """A diffusers class that a table is of: `hosts` are ComfyUI's (host.Network.name), `table` the file's name.

    `marks`: parts of stored names that tell the model where there is no config.json, with those of `never`, which it
    does not have. `fixed`: what config.json may say of what the host has in its code; a key left out, or null, is fine.
    `free`: its other keys, which sizes tell or nothing depends on. `refuses`: what else is wrong with a config.json, or
    empty. `wrong`: what is, in what the host would make of the tensors (its sizes), or empty. `header`: what the host
    reads of such a model in the header of a native file, by config.json. `companions`: their configurations are in
    config.json's under "_" and their names. `leaves`: the beginnings of stored names that are not for the host's model.
    `made`: tensors in the host's names that it reads of a file, and diffusers computes or says in its configuration.
    `predicts`: what the configuration says that the model predicts, in the host's word, or empty. `names`, where the
    host has the table: stored names -> every name that diffusers has of such a model, and the host's. `notes`: lines
    for the report.
    """

    title: str
    hosts: tuple[str, ...]
    table: str
    classes: tuple[str, ...]
    marks: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    free: frozenset[str]
    refuses: Callable[[Mapping[str, Any]], str] = lambda config: ""
    wrong: Callable[[Mapping[str, Any]], str] = lambda sizes: ""
    never: tuple[str, ...] = ()
    header: Callable[[Mapping[str, Any]], dict[str, str]] = lambda config: {}
    companions: Mapping[str, Companion] = {}
    leaves: tuple[str, ...] = ()
    made: Callable[[Mapping[str, Any]], dict[str, Tensor]] = lambda config: {}
    predicts: Callable[[Mapping[str, Any]], str] = lambda config: ""
    names: Callable[[Collection[str]], Mapping[str, str]] | None = None
    notes: Callable[[Mapping[str, Any]], list[str]] = lambda config: []

    @property
    def renames(self) -> bool:
        """Whether names tell diffusers' from the host's; where they do not, config.json does."""
        return self.names is not None or bool(_table(self.table))

    def is_named(self, text: str) -> bool:
        """Whether stored names, one a line, are those of this model, not below the prefix of a whole checkpoint."""
        return all(mark in text for mark in self.marks) and not any(mark in text for mark in (*self.never, WHOLE))

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError where config.json, or that of a companion, says what the host cannot run, or what this
        version does not know."""
        every = [(config, self.fixed, self.free),
                 *((config.get(f"_{name}") or {}, one.fixed, one.free) for name, one in self.companions.items())]
        for told, fixed, _ in every:
            other = [Text("{key} {value} (ComfyUI: {fixed})", key=key, value=told[key], fixed=fixed[key][0])
                     for key, value in _said(told) if key in fixed and value not in fixed[key]]
            if other:
                raise ValueError(Text("ComfyUI does not run a {model} like this one; config.json says {differs}",
                                      model=self.title, differs=joined(", ", other)))
        if why := self.refuses(config):
            raise ValueError(why)
        strange = [key for told, fixed, free in every if free is not None for key, value in _said(told)
                   if key not in fixed and key not in free and value]
        if strange:
            raise ValueError(Text("config.json of this {model} says {keys}, which this version does not know",
                                  model=self.title, keys=", ".join(sorted(strange))))


def _said(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a config.json says, lists as tuples."""
    return [(key, tuple(value) if isinstance(value, list) else value) for key, value in config.items()
            if not key.startswith("_") and value is not None and key != "quantization_config"]


class Part(NamedTuple):
    """Rows of a stored tensor, as fractions of them."""

    name: str
    first: Fraction
    last: Fraction


class Origin(NamedTuple):
    """What one of the host's tensors is made of."""

    parts: tuple[Part, ...]
    reshaped: bool


@cache
def _table(name: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return rows


def origins(table: Mapping[str, list[str]], stored: Collection[str]) -> dict[str, Origin]:
    """The host's name -> what it is made of, for all stored names: those of one of its tensors of which some are
    missing are named all the same."""
    alike = _alike(stored)
    found: dict[str, Origin] = {}
    used: set[str] = set()
    for pattern, parts in sorted(table.items(), key=lambda row: "{last}" in row[0]):  # the last block's come last
        split = [_SPLIT.fullmatch(part) for part in parts if part != "!reshape"]
        names = [part[1] for part in split if part]
        blocks: dict[tuple[str, ...], set[str]] = {}
        for name in names:
            for numbers, place in _places(name, stored, alike):
                blocks.setdefault(numbers, set()).add(place)
        if "{last}" in pattern and blocks:
            end = max(int(numbers[0]) for numbers in blocks)
            blocks = {numbers: there for numbers, there in blocks.items() if int(numbers[0]) == end}
        for numbers, there in blocks.items():
            found[_filled(pattern, numbers)] = Origin(_parts(parts, numbers), "!reshape" in parts)
            used |= there
    return found | {name: _whole(name) for name in stored if name not in used}


def made_of(name: str, native: Collection[str]) -> dict[str, tuple[Part, ...]]:
    """The other way round: the host's name -> the stored tensors whose rows make it, for all names of a model in the
    host's names but biases."""
    native = [one for one in native if not one.endswith(".bias")]
    alike = _alike(native)
    found = {one: _whole(one).parts for one in native}
    for pattern, parts in sorted(_table(name).items(), key=lambda row: "{last}" in row[0]):
        places = _places(pattern, native, alike)
        end = max((int(numbers[0]) for numbers, _ in places), default=0) if "{last}" in pattern else None
        for numbers, place in places:
            if end is None or int(numbers[0]) == end:
                found[place] = _parts(parts, numbers)
    return found


def _parts(row: list[str], numbers: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts that a row of a table names, with these numbers."""
    return tuple(Part(_filled(part[1], numbers), Fraction(part[2] or 0), Fraction(part[3] or 1))
                 for part in map(_SPLIT.fullmatch, row) if part and part[0] != "!reshape")


def _one_by_one(names: Mapping[str, str], stored: Collection[str]) -> dict[str, Origin]:
    """As `origins`, of a map from every stored name that there may be to the host's."""
    found: dict[str, Origin] = {}
    for name, native in names.items():
        if name in stored or native not in found:
            found[native] = _whole(name)
    return found | {name: _whole(name) for name in stored if name not in names}


def _whole(name: str) -> Origin:
    return Origin((Part(name, Fraction(0), Fraction(1)),), False)


def _alike(names: Collection[str]) -> dict[str, list[str]]:
    """The names by what they are without numbers and leaf: a table's are compared with these, not with all."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_without_numbers(name), []).append(name)
    return found


def _without_numbers(name: str) -> str:
    """A stored name, or one of a table, with 0 for every number and placeholder, and * for the leaf."""
    module, dot, leaf = name.rpartition(".")
    return f"{_NUMBER.sub('0', module)}{dot}{'*' if leaf in ('weight', 'bias') else leaf}"


def _places(name: str, stored: Collection[str],
            alike: Mapping[str, list[str]]) -> list[tuple[tuple[str, ...], str]]:
    """Every stored name that a name of a table is, with its numbers and leaf (see _matcher)."""
    if "{" in name:
        return [(match.groups(), match[0]) for one in alike.get(_without_numbers(name), ())
                if (match := _matcher(name).match(one))]
    leaves = ("weight", "bias") if "*" in name else ("",)  # a table of many names that have no number: no search
    return [((leaf,) if leaf else (), there) for leaf in leaves if (there := name.replace("*", leaf)) in stored]


@cache
def _matcher(name: str) -> re.Pattern[str]:
    """A pattern for a stored name of a table: groups are the numbers of blocks, then the leaf where it is any."""
    text = re.escape(name)
    for number in ("0", "1", "last"):
        text = text.replace(rf"\{{{number}\}}", r"(\d+)")
    return re.compile(text.replace(r"\*", r"(weight|bias)") + r"\Z")


def _filled(name: str, numbers: tuple[str, ...]) -> str:
    for at, number in enumerate(numbers):
        name = name.replace("*", number) if not number.isdigit() else \
            name.replace("{last}", number).replace(f"{{{at}}}", number)
    return name


class Translated(HostModel):
    """A model of the host's in diffusers' names. `native`: the shapes of its tensors in the host's.

    Raises ValueError where the stored shapes are those of no model that the host knows.
    """

    def __init__(self, derived: Derived, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str],
                 config: Mapping[str, Any]) -> None:
        metadata = {**metadata, **derived.header(config)}
        self._left = [name for name in shapes if name.startswith(derived.leaves)] if derived.leaves else []
        shapes = {name: shape for name, shape in shapes.items() if name not in self._left}
        self.derived, self._shapes, self._config = derived, shapes, config
        self._made_of = _one_by_one(derived.names(shapes), shapes) if derived.names else \
            origins(_table(derived.table), shapes)
        self.native = {name: shape for name, origin in self._made_of.items()
                       if (shape := _joined(origin, shapes)) is not None}
        made = {name: tensor for name, tensor in derived.made(config).items() if name not in self.native}
        self.native |= {name: tuple(tensor.shape) for name, tensor in made.items()}
        try:
            network = passthrough.network_of(self.native, metadata)
        except ValueError as error:
            raise ValueError(Text("ComfyUI makes no sense of this {model}: {error}", model=derived.title,
                                  error=error)) from error
        if network is None or network.name not in derived.hosts:
            raise ValueError(Text("ComfyUI knows no {model} of these tensors", model=derived.title))
        if why := derived.wrong(network.identity):
            raise ValueError(why)
        super().__init__(network, "", metadata)
        self.made = made
        self.native = {name: network.parameters.get(network.becomes.get(name) or "", shape)
                       for name, shape in self.native.items()}

    @property
    def notes(self) -> list[str]:
        """What a report says of it."""
        return self.derived.notes(self._config)

    def naming(self, names: Collection[str]) -> Naming | None:
        return Naming("diffusers")

    def confirm(self, patcher: Any) -> Dims:
        loaded = super().confirm(patcher)
        said = self.derived.predicts(self._config)
        if said and loaded["prediction"] != said:
            raise CheckpointError(Text("its scheduler_config.json says that this {model} predicts {said}, and ComfyUI "
                                       "takes it for {loaded}", model=self.derived.title, said=said,
                                       loaded=loaded["prediction"]), "",
                                  Text("load a single file of it with ComfyUI's names, and set what it predicts by a "
                                       "ModelSamplingDiscrete node"))
        return loaded

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        for module in super().modules(dims, Naming("native")):
            name = f"{module.stored[0]}.{module.stored_leaf}" if module.stored[0] else module.stored_leaf
            origin = self._made_of.get(name)
            if name not in self.made:
                yield module if origin is None or naming.style == "native" else self._translated(module, origin)
        for name in {name.rpartition(".")[0] for name in self._left} if naming.style != "native" else ():
            yield Module(name, (name,), (0,), bias=False, kind="dropped")

    def _translated(self, module: Module, origin: Origin) -> Module:
        names = [part.name.rpartition(".") for part in origin.parts]
        stored, leaf = tuple(name[0] for name in names), names[0][2]
        shapes = [self._shapes.get(part.name, ()) for part in origin.parts]
        if [(part.first, part.last) for part in origin.parts] == [(Fraction(1, 2), 1), (0, Fraction(1, 2))] \
                and len(set(stored)) == 1:
            return module._replace(stored=stored[:1], stored_leaf=leaf, swap_halves=True)
        if origin.reshaped:
            wanted = (*module.rows, *module.inner)
            if shapes[0] and prod(shapes[0]) == prod(wanted):
                return module._replace(stored=stored, rows=shapes[0][:1], inner=shapes[0][1:], stored_leaf=leaf,
                                       shape=wanted)
            return module._replace(stored=stored, stored_leaf=leaf)
        if len(stored) == 1:
            part = origin.parts[0]
            whole = sum(module.rows) / (part.last - part.first)
            ranges = () if whole == sum(module.rows) else ((int(whole * part.first), int(whole)),)
            return module._replace(stored=stored, stored_leaf=leaf, ranges=ranges)
        rows = tuple(shape[0] if shape else 0 for shape in shapes)
        # a part that is missing, or has other rows than the others leave for it, is told by its name
        left = sum(module.rows) - sum(rows)
        rows = tuple(count or left // rows.count(0) for count in rows) if 0 in rows else \
            (rows[0] + left, *rows[1:])
        return module._replace(stored=stored, rows=rows, stored_leaf=leaf)


def _joined(origin: Origin, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of what is made of the parts; None where one is missing."""
    found = [shapes.get(part.name) for part in origin.parts]
    if any(shape is None for shape in found):
        return None
    if not found[0]:
        return ()
    rows = [shape[0] * (part.last - part.first) for shape, part in zip(found, origin.parts, strict=True) if shape]
    return (int(sum(rows)), *found[0][1:])

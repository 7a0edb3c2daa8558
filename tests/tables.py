#!/usr/bin/env python3
"""Writes loaders/architectures/tables/*.json: which of diffusers' tensors make each tensor of a model that the host runs.

Every number of a tiny model in the host's own names gets a number of its own, diffusers' own converter is run on them,
and where each went says what it did, whatever that was: renamed, cut, joined, halves exchanged, another shape. What is
in the converters' sources of a model's real sizes is replaced while they run here. Where diffusers has no converter the
table is written by hand, and its forward (tests/architectures/test_derived_parity.py) is the proof.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.derived import CASES, SOURCES
from support.derived_case import Source

if TYPE_CHECKING:
    from quantized_transformers.loaders.architectures.derived import Derived

FOLDER = Path(__file__).resolve().parent.parent / "loaders" / "architectures" / "tables"


class Part(NamedTuple):
    """A range of rows of one of diffusers' tensors, as fractions of them."""

    name: str
    first: Fraction = Fraction(0)
    last: Fraction = Fraction(1)

    def __str__(self) -> str:
        return self.name + (f"[{self.first}:{self.last}]" if (self.first, self.last) != (0, 1) else "")


class Made(NamedTuple):
    """What one of the host's tensors is made of, and whether it then gets another shape."""

    parts: tuple[Part, ...]
    reshaped: bool


def converted(name: str, native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in diffusers' names, by diffusers' own converter, or where it has none by the table."""
    from diffusers.loaders import single_file_utils

    from support import host_models

    source = SOURCES[name]
    if source.convert:
        return source.convert(native)
    if not source.converter:
        return by_table(name, native)
    convert = host_models.resized(getattr(single_file_utils, source.converter), source.sizes, source.mended)
    hand = {name: _by_hand(source, name) for name in native}
    made: dict[str, torch.Tensor] = convert(
        {source.prefix + name: tensor.clone() for name, tensor in native.items() if hand[name] == name}, config={})
    return made | {other: native[name] for name, other in hand.items() if other != name}


def _by_hand(source: Source, name: str) -> str:
    for at, (pattern, other) in enumerate(source.by_hand):
        made = re.sub(pattern, other, name)
        if made != name:
            for pattern, other in source.by_hand[at + 1:]:
                made = re.sub(pattern, other, made)
            return made
    return name


def by_table(name: str, native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in diffusers' names, by a table read backwards, of the shapes that diffusers' class has."""
    shapes = of_diffusers(name, native)
    rows = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    patterns = [(re.compile(re.sub(r"\\{(\d|last)\\}", r"(\\d+)", re.escape(row)).replace(r"\*", "(weight|bias)") + "$"), row)
                for row in sorted(rows, key=lambda row: "{last}" not in row)]
    last = {stem: max(int(number) for number in numbers) for stem, numbers in _numbers(native).items()}
    found: dict[str, list[tuple[Fraction, torch.Tensor]]] = defaultdict(list)
    for key, tensor in native.items():
        parts = [key]
        for pattern, row in patterns:
            match = pattern.match(key)
            if match and ("{last}" not in row or int(match[1]) == last[key[:match.start(1)]]):
                at = {str(index): number for index, number in enumerate(match.groups())} | {"last": match[1] if match.groups() else ""}
                parts = [re.sub(r"\{(\d|last)\}", lambda found, at=at: at[found[1]], part).replace(".*", "." + match.groups()[-1]
                         if match.groups() else "") for part in rows[row]]
                break
        split = [re.fullmatch(r"(.+?)(?:\[([\d/]+):([\d/]+)\])?", part) for part in parts if part != "!reshape"]
        ranges = [(one[1], Fraction(one[2] or 0), Fraction(one[3] or 1)) for one in split if one]
        if "!reshape" in parts:
            found[ranges[0][0]].append((Fraction(0), tensor.reshape(shapes[ranges[0][0]])))
            continue
        sizes = [int(shapes[part][0] * (end - start)) for part, start, end in ranges] if tensor.ndim else []
        for (part, start, _), piece in zip(ranges, tensor.split(sizes) if sizes else [tensor], strict=True):
            found[part].append((start, piece))
    made = {part: torch.cat([piece for _, piece in sorted(pieces, key=lambda one: one[0])]) if len(pieces) > 1 else pieces[0][1]
            for part, pieces in found.items()}
    assert {part: tensor.shape for part, tensor in made.items()} == shapes
    return made


def of_diffusers(name: str, native: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """What diffusers' class stores of the tiny model that has as many numbers as these tensors."""
    import diffusers

    for case in CASES[name]:
        with torch.device("meta"):
            net = getattr(diffusers, case.kind or _derived(name).classes[0])(**case.config)
        shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
        if sum(shape.numel() for shape in shapes.values()) == sum(tensor.numel() for tensor in native.values()):
            return shapes
    raise ValueError(f"no case of {name} has as many numbers")


def _numbers(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for number in re.finditer(r"\d+(?=\.)", name):
            found[name[:number.start()]].add(number[0])
    return found


def is_there(name: str) -> bool:
    """Whether this diffusers has the classes and the converter: older ones know fewer."""
    import diffusers
    from diffusers.loaders import single_file_utils

    has = all(hasattr(diffusers, kind) for kind in _derived(name).classes)
    return has and (not SOURCES[name].converter or hasattr(single_file_utils, SOURCES[name].converter))


def _derived(name: str) -> Derived:
    from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED

    return next(one for one in DERIVED if one.table == name)


def published(source: Source, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as publishers call them, without what only the host's files have."""
    return {re.sub(*source.published, name): tensor for name, tensor in tensors.items() if name not in source.unread}


def tagged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every number another one."""
    at, made = 0, {}
    for name, tensor in tensors.items():
        made[name] = torch.arange(at, at + tensor.numel()).reshape(tensor.shape)
        at += tensor.numel()
    return made


def origins(native: dict[str, torch.Tensor], diffusers: dict[str, torch.Tensor]) -> dict[str, Made]:
    """The host's tensor -> what it is made of. Raises ValueError where numbers went their ways one by one."""
    names, ends = list(native), torch.tensor([tensor.numel() for tensor in native.values()]).cumsum(0)
    found: dict[str, list[tuple[int, int, Part, torch.Size]]] = defaultdict(list)
    for name, tensor in diffusers.items():
        ids, size = tensor.reshape(-1), tensor.numel()
        owner = torch.bucketize(ids, ends, right=True)
        cuts = ((ids[1:] - ids[:-1] != 1) | (owner[1:] != owner[:-1])).nonzero().flatten() + 1
        bounds = [0, *cuts.tolist(), size]
        if len(bounds) > 9:
            raise ValueError(f"{name} is scattered")
        for first, last in zip(bounds, bounds[1:], strict=False):
            of = int(owner[first])
            found[names[of]].append((int(ids[first]), last - first,
                                     Part(name, Fraction(first, size), Fraction(last, size)), tensor.shape))
    made = {}
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        assert sum(count for _, count, _, _ in pieces) == native[name].numel(), name
        # one piece of a tensor that is whole here and whole there was cut where rows of it were exchanged back
        parts = tuple(part for _, _, part, _ in pieces)
        rows = sum(shape[0] * (part.last - part.first) for _, _, part, shape in pieces if shape)
        shape = (int(rows), *pieces[0][3][1:]) if pieces[0][3] else ()
        made[name] = Made(parts, tuple(native[name].shape) != shape)
    return made


def stacks(model: str) -> frozenset[str]:
    """The names of the host's lists of blocks: a number behind one is that of a block. Some are dictionaries of "block0"."""
    import comfy.ops

    from support import host_models

    place, kwargs = host_models.MODELS[model][:2]
    with host_models.detected(model), torch.device("meta"):
        net = getattr(*host_models.found(place))(**kwargs, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return frozenset(re.sub(r"\d+", "#", name) for name, module in net.named_modules()
                     if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict))


def _blocks(name: str, lists: frozenset[str] | set[str]) -> list[tuple[str, str, str]]:
    """(list, what a number follows directly, number) of a name."""
    return [(place, found[1], found[2]) for found in re.finditer(r"\.([a-z]*)(\d+)(?=\.)", name)
            if (place := re.sub(r"\d+", "#", name[:found.start()])) in lists]


def folded(made: dict[str, Made], lists: frozenset[str]) -> dict[str, list[str]]:
    """Patterns: {0}, {1} are numbers of blocks, `.*` any leaf of a module. Only what is called otherwise on the two
    sides, or made of more than one tensor."""
    blocks = set(lists)
    for name, (parts, _) in made.items():  # a number that diffusers' name does not have is a part's
        numbers = []
        for place, _, number in _blocks(name, blocks):
            numbers.append(number)
            if any(len(re.findall(rf"\.{number}(?=\.)", part.name)) < numbers.count(number) for part in parts):
                blocks.discard(place)
                numbers.pop()
    rows: dict[str, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, (parts, reshaped) in made.items():
        if not reshaped and [str(part) for part in parts] == [name]:
            continue
        pattern, numbers = name, []
        for _, word, number in _blocks(name, blocks):
            pattern = pattern.replace(f".{word}{number}.", f".{word}{{{len(numbers)}}}.", 1)
            numbers.append(int(number))
        others = []
        for part in parts:
            text = str(part)
            for at, number in enumerate(numbers):
                text = re.sub(rf"\.{number}(?=\.)", f".{{{at}}}", text, count=1)
            others.append(text)
        leaf = name.rpartition(".")[2]
        if leaf in ("weight", "bias") and all(part.name.endswith(f".{leaf}") for part in parts) and not reshaped:
            pattern = pattern.removesuffix(leaf) + "*"
            others = [re.sub(rf"\.{leaf}(?=$|\[)", ".*", text) for text in others]
        if reshaped:
            others.append("!reshape")
        rows[pattern][tuple(others)] += numbers[:1]
    table = {}
    for pattern, ways in rows.items():
        common = max(ways, key=lambda way: -max(ways[way], default=0))
        table[pattern] = list(common)
        for way in ways:
            if way != common:  # of the last block
                assert len(ways) == 2 and min(ways[way]) > max(ways[common]), (pattern, ways)
                table[pattern.replace("{0}", "{last}")] = [part.replace("{0}", "{last}") for part in way]
    return table


def table(name: str) -> dict[str, list[str]]:
    """A table, derived."""
    from support import host_models

    source, rows = SOURCES[name], {}
    if source.rule:
        return source.rule()
    for model in source.models:
        native = tagged(published(source, host_models.make(model)))
        for pattern, parts in folded(origins(native, converted(name, native)), stacks(model)).items():
            assert rows.setdefault(pattern, parts) == parts, (pattern, parts, rows[pattern])
    return rows


def text(rows: dict[str, list[str]]) -> str:
    """A table as its file has it."""
    lines = [f"{json.dumps(pattern)}: {json.dumps(parts)}" for pattern, parts in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(names: Iterator[str] | list[str]) -> None:
    """Write the tables of these names, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or [name for name, source in SOURCES.items() if source.converter or source.rule]:
        (FOLDER / f"{name}.json").write_text(text(table(name)), encoding="utf-8")


if __name__ == "__main__":
    from support.pack import start_comfy

    start_comfy()
    main(sys.argv[1:])

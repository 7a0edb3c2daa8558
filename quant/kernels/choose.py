"""Which kernel multiplies which codec: one choice, which loads, reports, badges and doctor share.

Pure: what it needs to know of the machine comes in as a value. For each codec, in the order of the registry: the first
kernel that is native there, else the first that is usable, else dequantized weights. A kernel that is asked for by name
is taken or refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from ... import host
from ...host import Machine
from ...host.errors import CheckpointError
from ...host.texts import Text, both, joined
from ..codecs import codec
from . import kernel, kernels
from .base import DEQUANTIZE, NATIVE, SLOW, USABLE, Kernel, Speed


@dataclass(frozen=True)
class Wanted:
    """What the user asks for, as the nodes' widgets say it.

    `compute`: auto, native (quantized matmuls) or dequantize. `fp4_backend`: of FlashInfer. `backend`: a
    kernel's name, for the codecs that it takes.
    """

    compute: str = "auto"
    fp4_backend: str = "auto"
    backend: str = ""


class Choice(NamedTuple):
    """`kernels`: codec -> kernel. `lines` say who runs what and why, `notes` what is worth knowing besides. `native`:
    whether every codec runs natively."""

    kernels: dict[str, str]
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    native: bool


class _Pick(NamedTuple):
    kernel: Kernel
    why: str
    speed: Speed


def here(codecs: Collection[str] | None = None) -> Machine:
    """This machine, with what kernels for these codecs (None: all) find on it."""
    machine = host.machine()
    return replace(machine, found={one.name: one.probe(machine) for one in kernels()
                                   if codecs is None or not set(codecs).isdisjoint(one.codecs)})


def choose(wanted: Wanted, codecs: Collection[str], machine: Machine) -> Choice:
    """The kernels for layers of these codecs. Raises CheckpointError for a wanted one that cannot run them there."""
    names = sorted(set(codecs) - {"plain"})
    own, notes = dict[str, str](), list[str]()
    for one in kernels():
        found, note = one.asked(wanted, names, machine)
        own |= dict.fromkeys(one.codecs, found) if found else {}
        notes += [note] if note else []
    picked = {name: _pick(wanted, name, machine, own.get(name, ""), names) for name in names}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, (run, why, speed) in picked.items():
        groups.setdefault((run.name or "dequantize", why, speed.words), []).append(codec(name).title)
    lines = []
    for (run_name, why, words), titles in groups.items():
        titles = list(dict.fromkeys(titles))
        lines.append(Text("{formats} run{s}: {kernel} ({why}) on {device}: {words}", formats=both(titles),
                          s="" if len(titles) > 1 else "s", kernel=run_name, why=why, device=machine.name,
                          words=words))
    warnings = [one.warning(machine) for one in kernels() if not set(names).isdisjoint(one.codecs)]
    return Choice({name: pick.kernel.name for name, pick in picked.items()}, tuple(lines),
                  (*notes, *(warning for warning in warnings if warning)),
                  all(pick.speed.level == NATIVE for pick in picked.values()))


def _pick(wanted: Wanted, name: str, machine: Machine, own: str, names: Collection[str]) -> _Pick:
    asked = wanted.backend if wanted.backend not in ("", "auto") else ""
    if asked == "dequantize" or not asked and wanted.compute == "dequantize":
        return _Pick(DEQUANTIZE, Text("as chosen"), DEQUANTIZE.speed(name, machine))
    if asked and not any(asked == one.name for one in kernels()):
        raise CheckpointError(Text("backend {asked!r}, expected one of auto, dequantize, {names}", asked=asked,
                                   names=", ".join(one.name for one in kernels() if not one.by_name)), "",
                              Text("set backend to 'auto'"))
    asked = asked or own
    if asked and name in kernel(asked).codecs:
        problem = kernel(asked).runs(name, machine)
        if problem:
            auto = _auto(name, machine, names).kernel.name or "dequantize"
            raise CheckpointError(Text("{kernel} cannot run these layers: {problem}", kernel=asked, problem=problem),
                                  Text("{format} layers", format=codec(name).title),
                                  Text("set backend to 'auto', which takes {kernel} here", kernel=auto))
        speed, kind = kernel(asked).speed(name, machine), codec(name)
        if speed.level == SLOW and kind.switch and not kind.requantizes:  # the host has its matmul off here
            speed = speed._replace(words=joined("; ", (speed.words, DEQUANTIZE.speed(name, machine).words)))
        return _Pick(kernel(asked), Text("as chosen"), speed)
    return _native(name, machine) if wanted.compute == "native" else _auto(name, machine, names)


def _candidates(name: str) -> list[Kernel]:
    return [one for one in kernels() if name in one.codecs and not one.by_name]


def _auto(name: str, machine: Machine, names: Collection[str]) -> _Pick:
    found = [(one, one.speed(name, machine)) for one in _candidates(name) if not any(
        one.runs(other, machine) for other in (names if one.whole_file else (name,)) if other in one.codecs)]
    for level in (NATIVE, USABLE):
        for one, speed in found:
            if speed.level == level:
                return _Pick(one, Text("chosen for this device"),
                             speed._replace(words=_and_why(name, machine, one, speed)))
    own = DEQUANTIZE.speed(name, machine)
    reason = [found[0][1].words] if found else []
    return _Pick(DEQUANTIZE, Text("chosen for this device"), own._replace(
        words=joined("; ", [*_passed(_candidates(name), name, machine), *reason, own.words])))


def _and_why(name: str, machine: Machine, taken: Kernel, speed: Speed) -> str:
    """The words, and why a kernel of this very device was passed over."""
    before = _candidates(name)[:_candidates(name).index(taken)]
    return joined("; ", [*_passed(before, name, machine), speed.words])


def _passed(kernels: Collection[Kernel], name: str, machine: Machine) -> list[str]:
    """Why those of them that are for this very device do not run there."""
    return [why for one in kernels if one.device == machine.kind and (why := one.runs(name, machine))]


def _native(name: str, machine: Machine) -> _Pick:
    """The first kernel that quantizes activations as well. Raises CheckpointError where the device's own cannot."""
    problem: str = Text("nothing multiplies {format} layers quantized", format=codec(name).title)
    for one in _candidates(name):
        if one.device not in ("", machine.kind):
            continue
        problem = one.quantizes(name, machine)
        if not problem:
            return _Pick(one, Text("as chosen"), one.speed(name, machine))
        if one.device:
            break
    raise CheckpointError(problem, "", Text("set compute to 'auto' or 'dequantize'"))

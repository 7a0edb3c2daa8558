"""How a checkpoint's layers will run on this machine, in one word and one line: for badges, the catalog and doctor.

The choice is the one that a load makes (quant/kernels/choose.py); this only puts a colour to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

from .. import host
from ..host.texts import Text, joined
from ..loaders.errors import CheckpointError
from ..quant import host_formats

GREEN, AMBER, RED = "green", "amber", "red"
_ORDER = (GREEN, AMBER, RED)


class Verdict(NamedTuple):
    """`level` is green (native kernels), amber (right but emulated) or red (cannot be loaded); `text` is one line."""

    level: str
    text: str


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several, with the words of all of its level."""
    found = list(dict.fromkeys(verdicts))
    level = max((verdict.level for verdict in found), key=_ORDER.index)
    return Verdict(level, joined("; ", (verdict.text for verdict in found if verdict.level == level)))


def of_formats(formats: Collection[str]) -> Verdict:
    """How layers of these formats run: names as reports have them."""
    titles, verdicts = by_title(), []
    for names in (set(one.split(" + ")) for one in formats):  # a layer may be in several
        codecs = frozenset(name for one in names for name in titles.get(one, ()))
        if codecs:
            verdicts.append(of_codecs(codecs, mixed=len(names) > 1))
    verdicts += [_of_handed(name) for name in sorted(formats) if name in host_formats.NAMES]
    return worst(verdicts) if verdicts else Verdict(GREEN, Text("not quantized: runs as ComfyUI runs it"))


@lru_cache(maxsize=1)
def by_title() -> dict[str, tuple[str, ...]]:
    """Name of a format in reports -> its codecs."""
    from ..quant.codecs import codecs
    from ..quant.formats import formats

    found: dict[str, tuple[str, ...]] = {fmt.name: (fmt.codec,) for fmt in formats() if fmt.codec != "plain"}
    for name, codec in codecs().items():
        if name != "plain":
            for title in (codec.title, *codec.also):
                found[title] = tuple(dict.fromkeys((*found.get(title, ()), name)))
    return found


@lru_cache
def of_codecs(codecs: frozenset[str], mixed: bool = False) -> Verdict:
    """How layers of these codecs run here with everything on auto; `mixed`: tiles of one weight are in several."""
    from ..quant.codecs import codec
    from ..quant.kernels.choose import Wanted, choose, here
    from ..quant.layouts.join import in_full_precision

    try:
        host.require("quantized layers", *sorted({codec(name).feature for name in codecs} - {""}))
        compute = "dequantize" if mixed and in_full_precision({*codecs, "plain"}) else "auto"
        choice = choose(Wanted(compute), codecs, here(codecs))
    except CheckpointError as error:
        return Verdict(RED, error.what)
    return Verdict(GREEN if choice.native else AMBER, joined("; ", choice.lines))


def _of_handed(name: str) -> Verdict:
    """How a format that only the host makes sense of runs here."""
    word = host_formats.NAMES[name]
    if word not in host.quantized_formats():
        return Verdict(RED, Text("ComfyUI {version} does not have the format {word!r} ({name}): update ComfyUI",
                                 version=host.version(), word=word, name=name))
    return Verdict(AMBER if host.is_cpu() else GREEN,
                   Text("{name} is multiplied by ComfyUI itself on {device}", name=name, device=host.device_name()))


def families() -> list[tuple[str, Verdict]]:
    """One line for each codec, or for several that run alike: what happens to it on this machine."""
    from ..quant.codecs import codecs as every

    others = {title for codec in every().values() for title in codec.also}
    lines: dict[str, Verdict] = {}
    for title, codecs in by_title().items():
        name = every()[codecs[0]].listed or title
        if title not in others and name not in lines:
            lines[name] = of_codecs(frozenset(codecs))
    return [*lines.items(), ("BF16, F16, F32", Verdict(GREEN, Text("not quantized: runs as ComfyUI runs it")))]

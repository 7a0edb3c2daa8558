"""What the nodes' lists hold: made when ComfyUI tells a page of its nodes or checks a prompt, kept while nothing
changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import host
from ..loaders import local
from ..loaders.components.overrides import NONE
from ..loaders.families.modelslim import files as modelslim
from ..loaders.families.nunchaku import files as nunchaku
from ..loaders.families.repos import KNOWN_BASES, OVERRIDES
from ..loaders.local import ENCODER, LIKELY, MAYBE, SURE, TEXTS, TRANSFORMER, VAE, Local


class Made(NamedTuple):
    """A list's values, and the one that a new node has."""

    values: list[str]
    start: str


class Checkpoints(NamedTuple):
    """What a node can load: what the model folders hold, what fits best first, then the `known` repo ids.

    `fit` of something in a model folder is local.SURE, LIKELY or MAYBE, or None for what is not to be listed. A new
    node starts with `first`, else with the first that is sure or likely to load, else with the first known repo.
    """

    fit: Callable[[Local], int | None]
    known: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


def _as(kind: str) -> Callable[[Local], int | None]:
    """How well something can be loaded as a kind of local's."""
    return lambda one: one.fits.get(kind)


def _as_override(one: Local) -> int | None:
    """Quantized ones first."""
    fit = one.fits.get(TRANSFORMER)
    return fit if fit in (None, MAYBE) else SURE if one.quantized else LIKELY


def _as_nunchaku(one: Local) -> int | None:
    """Nunchaku's by name; what may have been renamed; not what is called by another quantization."""
    if TRANSFORMER not in one.fits:
        return None
    if one.method in nunchaku.METHODS or one.called(nunchaku.named_file):
        return SURE
    return MAYBE if not one.quantized or re.search("(?i)nunchaku|int4|fp4", one.reference) else None


def _as_anything(one: Local) -> int | None:
    """Everything, transformers first."""
    return one.fits.get(TRANSFORMER, MAYBE)


CHECKPOINTS = {
    "transformers": Checkpoints(_as(TRANSFORMER), KNOWN_BASES),
    "text_encoders_of_bases": Checkpoints(_as(TEXTS), KNOWN_BASES),
    "text_encoders": Checkpoints(_as(ENCODER), first=(NONE,)),
    "VAEs": Checkpoints(_as(VAE), KNOWN_BASES),
    "overrides": Checkpoints(_as_override, (*OVERRIDES, *nunchaku.KNOWN)),
    "server_bases": Checkpoints(_as(TEXTS), KNOWN_BASES),
    "server_overrides": Checkpoints(_as_override, (*OVERRIDES, *nunchaku.KNOWN), (NONE,)),
    "nunchaku": Checkpoints(_as_nunchaku, nunchaku.KNOWN),
    "anything": Checkpoints(_as_anything, (*OVERRIDES, *nunchaku.KNOWN, *KNOWN_BASES)),
}
_kept: dict[str, tuple[Any, Made]] = {}  # name -> (what it was made of, the list)


def made(name: str) -> Made:
    """A list by its name, as it is now."""
    if name not in CHECKPOINTS:
        values = list(_PLAIN[name]())
        return Made(values, values[0] if values else "")
    found = local.references()
    kept = _kept.get(name)
    if kept is None or kept[0] is not found:
        fit, known, first = CHECKPOINTS[name]
        fits = [(how, one.reference) for one in found if (how := fit(one)) is not None]
        fits.sort(key=lambda pair: pair[0])  # those that fit alike stay in their order
        values = list(dict.fromkeys([*first, *(reference for _, reference in fits), *known]))
        start = [*first, *(reference for how, reference in fits if how < MAYBE), *known][0]
        kept = _kept[name] = found, Made(values, start)
    return kept[1]  # ComfyUI copies the values into what it answers


def known(name: str) -> tuple[str, ...]:
    """The repo ids in a list of checkpoints, which need not be here."""
    return modelslim.KNOWN if name == "modelslim" else CHECKPOINTS[name].known


def _modelslim() -> dict[str, None]:
    return dict.fromkeys([*modelslim.local_folders(), *modelslim.KNOWN])


def _loras() -> list[str]:
    return [name for name in host.lora_files() if name.endswith(".safetensors")]


def _model_types() -> tuple[str, ...]:
    from ..makers.builders.presets import MODEL_TYPES

    return MODEL_TYPES


def _pattern_presets() -> dict[str, tuple[str, ...]]:
    from ..makers.builders.presets import PATTERN_PRESETS

    return PATTERN_PRESETS


def _gguf_types() -> tuple[str, ...]:
    from ..makers.builders.gguf_rules import KINDS

    return KINDS


_PLAIN: dict[str, Callable[[], Any]] = {
    "modelslim": _modelslim, "experts": lambda: modelslim.EXPERTS, "precisions": lambda: nunchaku.PRECISIONS,
    "LoRAs": _loras, "model_types": _model_types, "pattern_presets": _pattern_presets, "GGUF_types": _gguf_types}

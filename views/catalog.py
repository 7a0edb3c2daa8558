"""What could be loaded: everything in the model folders, and the support matrix, with the node that takes each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..host.texts import one_line
from ..loaders import local
from ..loaders.errors import CheckpointError, OtherKind
from ..loaders.families import families
from ..loaders.queries import Query
from .card import title
from .known import KNOWN_CHECKPOINTS
from .verdict import RED

# kind, in the order to show -> the node that loads it, and its widget that takes the reference
LOADS_WITH = {"base": ("QT_LoadBaseModel", "base_model"), "override": ("QT_ApplyTransformerOverride", "override"),
              "svdq": ("QT_NunchakuSVDQLoader", "weights"), "modelslim": ("QT_ModelSlimLoader", "folder")}
_UNQUANTIZED = ("", "BF16", "F16", "F32")


@dataclass(frozen=True)
class Entry:
    """A reference and what its name says: `kind` is a guess until its headers are read, for all but known repos."""

    reference: str
    kind: str
    known: bool = False
    pipeline: bool = False

    @property
    def query(self) -> Query:
        """What to describe."""
        return Query(self.reference, LOADS_WITH[self.kind][0])


def entries() -> list[Entry]:
    """Every transformer in the model folders, then the known repos. Reads no headers."""
    own = {name: family.kind for family in families() for name in family.local_references()}
    found = [Entry(name, kind) for name, kind in own.items()]
    for one in local.references():
        if one.reference not in own and local.TRANSFORMER in one.fits:
            kind = next((family.kind for family in families() if one.called(family.is_named)), "override")
            kind = "base" if one.pipeline else kind
            found.append(Entry(one.reference, kind, pipeline=one.pipeline))
    there = {entry.reference for entry in found}
    return [*found, *(Entry(name, known.kind, True) for name, known in KNOWN_CHECKPOINTS.items() if name not in there)]


def item(entry: Entry, card: dict[str, Any] | CheckpointError | None) -> dict[str, Any]:
    """An entry of the catalog from its judged card, or from why there is none; None: not described yet."""
    kind, known = entry.kind, KNOWN_CHECKPOINTS[entry.reference] if entry.known else None
    out: dict[str, Any] = {
        "reference": entry.reference, "title": title(entry.reference), "architecture": known and known.architecture,
        "family": known and known.family, "formats": list(known.formats) if known else [],
        "hubs": list(known.hubs) if known else [], "size": 0, "on_disk": known is None,
        "foreign": isinstance(card, OtherKind), "verdict": None, "verdict_text": ""}
    if isinstance(card, OtherKind):
        out |= {"architecture": "", "family": "", "verdict_text": one_line(card.what)}
    elif isinstance(card, CheckpointError):
        out |= {"architecture": out["architecture"] or "", "family": out["family"] or "", "verdict": RED,
                "verdict_text": one_line(card.what)}
    elif card is not None:
        out |= {key: card[key] for key in ("architecture", "size", "on_disk", "verdict", "verdict_text")}
        out["family"] = card["family"] or out["family"] or ""
        out["formats"] = [row["format"] for row in card["formats"]] or out["formats"]
        if known is None:
            kind = _kind(entry, card)
    node, widget = LOADS_WITH[kind]
    return out | {"kind": kind, "node": node, "input": widget}


def _kind(entry: Entry, card: dict[str, Any]) -> str:
    family = card["family"]
    for known in families():
        if known.title and known.kind != "override" and family.startswith(known.title):
            return known.kind
    return "base" if entry.pipeline or family in _UNQUANTIZED else "override"


def listing(items: Iterable[dict[str, Any]], pending: bool) -> dict[str, Any]:
    """The catalog: items, their kinds, and the values that filters offer."""
    items = list(items)
    return {"items": items, "kinds": list(LOADS_WITH), "pending": pending,
            "architectures": sorted({one["architecture"] for one in items if one["architecture"]}),
            "formats": sorted({name for one in items for name in one["formats"]})}

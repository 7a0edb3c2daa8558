"""What is known of the support matrix's checkpoints before any of their bytes are here."""

from __future__ import annotations

from typing import NamedTuple

from ..loaders.families import families
from ..loaders.families.repos import KNOWN_BASES
from ..loaders.files import hubs
from ..loaders.files.places import downloadable
from .verdict import Verdict, of_formats

# What a repo's name says of its architecture, the first that fits.
_ARCHITECTURES = (("vace", "WAN21_Vace"), ("hunyuanvideo-1.5", "HunyuanVideo15"), ("chroma", "Chroma"),
                  ("hidream", "HiDream"), ("ltx-2", "LTXAV"), ("stable-diffusion-3", "SD3"), ("flux.2", "FLUX.2"),
                  ("flux2", "FLUX.2"), ("flux", "FLUX.1"), ("wan", "Wan"), ("hunyuanvideo", "HunyuanVideo"),
                  ("qwen-image", "Qwen-Image"), ("z-image", "Z-Image"), ("sdxl", "SDXL"))


class Known(NamedTuple):
    """`kind` as in the catalog; `family` is the badge's text ("" for unquantized bases)."""

    reference: str
    kind: str
    architecture: str
    family: str

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of what a load takes of it on this machine."""
        return tuple(name for family in families() if self.reference in family.published
                     for name in family.usual_formats(self.reference))

    @property
    def hubs(self) -> tuple[str, ...]:
        """Where it is to be had; empty where that is not known."""
        return hubs.known(self.reference)

    def verdict(self) -> Verdict:
        """How it will run here, once it is."""
        return of_formats(self.formats)


def _known(reference: str, kind: str, family: str = "") -> Known:
    name = reference.partition("/")[2].lower()
    architecture = next(words for part, words in _ARCHITECTURES if part in name)
    return Known(reference, kind, architecture, family)


# A repo may be given as a base and as an override; it is listed once, as the latter.
KNOWN_CHECKPOINTS: dict[str, Known] = {reference: _known(reference, "base") for reference in KNOWN_BASES} | {
    reference: _known(reference, family.kind, family.badge(reference))
    for family in reversed(families()) for reference in family.published}


def known(reference: str) -> Known | None:
    """What is known of a reference, whatever hub it names, or of the repo that a file of its name is published in."""
    return (KNOWN_CHECKPOINTS.get(hubs.split(reference.strip())[1])
            or KNOWN_CHECKPOINTS.get("/".join(hubs.split(downloadable(reference))[1].split("/")[:2])))

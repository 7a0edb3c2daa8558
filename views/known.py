"""What is known of the support matrix's checkpoints before any of their bytes are here."""

from __future__ import annotations

from typing import NamedTuple

from ..loaders.families import families
from ..loaders.locate import KNOWN_BASES, KNOWN_OVERRIDES
from .verdict import Verdict, of_formats

# What a repo's name says of its architecture, the first that fits.
_ARCHITECTURES = (("flux.2", "FLUX.2"), ("flux2", "FLUX.2"), ("flux", "FLUX.1"), ("wan", "Wan"),
                  ("hunyuanvideo", "HunyuanVideo"), ("qwen-image", "Qwen-Image"), ("z-image", "Z-Image"),
                  ("sdxl", "SDXL"))
_FAMILIES = (("modelopt-fp8", "ModelOpt FP8", ("FP8",)), ("modelopt-nvfp4", "ModelOpt NVFP4", ("NVFP4",)),
             ("-nvfp4", "NVFP4", ("NVFP4",)), ("-w8a8", "ModelSlim W8A8", ("W8A8_DYNAMIC",)))


class Known(NamedTuple):
    """`kind` as in the catalog; `family` is the badge's text ("" for unquantized bases), `formats` its quantized."""

    reference: str
    kind: str
    architecture: str
    family: str
    formats: tuple[str, ...]

    def verdict(self) -> Verdict:
        """How it will run here, once it is."""
        return of_formats(self.formats or next((f.usual_formats() for f in families() if f.kind == self.kind), ()))


def _known(reference: str, kind: str) -> Known:
    name = reference.partition("/")[2].lower()
    architecture = next(words for part, words in _ARCHITECTURES if part in name)
    title = next((family.title for family in families() if family.kind == kind), "")
    family, formats = next(((words, formats) for part, words, formats in _FAMILIES if part in name), (title, ()))
    return Known(reference, kind, architecture, family, formats)


KNOWN_CHECKPOINTS: dict[str, Known] = {
    reference: _known(reference, kind) for kind, references in (
        ("base", KNOWN_BASES), ("override", KNOWN_OVERRIDES), *((f.kind, f.published) for f in families()))
    for reference in references}

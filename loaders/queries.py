"""What a node loads, as its widgets have it: the question that badges, checks, downloads and workers ask of files."""

from __future__ import annotations

from dataclasses import dataclass

from ..host.texts import Text
from .components import overrides
from .errors import CheckpointError
from .families import choices_of, families
from .files.places import Fetch, cleaned
from .files.selection import COMPONENTS
from .files.source import Source
from .locate import locate

TEXT_ENCODER, VAE = "QT_LoadBaseTextEncoder", "QT_LoadBaseVAE"
NODES = ("QT_LoadBaseModel", "QT_ApplyTransformerOverride", "QT_NunchakuSVDQLoader", "QT_ModelSlimLoader",
         "QT_InspectCheckpoint", TEXT_ENCODER, VAE)


@dataclass(frozen=True)
class Query:
    """A reference and what else chooses among its files, as the widgets of `node` have it.

    `weights` "defer to override" asks for the configuration only; `base` is the reference of the model that an override
    must fit; `layers` adds the layer map; the `override` inputs are those of Load Base Text Encoder. Raises
    CheckpointError for values that no widget has.
    """

    reference: str
    node: str = "QT_InspectCheckpoint"
    component: str = "transformer"
    weights_name: str = ""
    revision: str = ""
    precision: str = "auto"
    rank: int = 0
    weights: str = "load"
    base: str = ""
    base_component: str = "transformer"
    layers: bool = False
    override: str = ""
    override_reference: str = ""
    override_2: str = ""
    override_2_reference: str = ""

    @property
    def overrides(self) -> tuple[str, ...]:
        """References to what takes the place of a base's text encoders."""
        return overrides.chosen(vars(self)) if self.node == TEXT_ENCODER else ()

    def __post_init__(self) -> None:
        choices = {"node": NODES, "component": COMPONENTS, "base_component": COMPONENTS,
                   "weights": ("load", "defer to override")}
        for family in families():
            choices |= family.options
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CheckpointError(Text("{name} is none of {allowed}", name=name, allowed=", ".join(allowed)),
                                      repr(str(getattr(self, name))[:80]), Text("correct it"))
        object.__setattr__(self, "reference", cleaned(self.reference))
        if not self.reference:
            raise CheckpointError(Text("no checkpoint is chosen"),
                                  do=Text("pick one in the list, or give a path or repo id"))
        if not 0 <= self.rank <= 1024:
            raise CheckpointError(Text("rank is not in 0..1024"), str(self.rank), Text("correct it"))


def locate_parts(query: Query, download: bool | Fetch = False) -> list[Source]:
    """The files that `query.node` loads of the reference: one Source, or several for text encoders.

    `download` as in sources.resolve. Raises CheckpointError as the nodes do.
    """
    if query.node == TEXT_ENCODER:
        from .components import text_encoder

        return text_encoder.sources(text_encoder.Request(query.reference, query.revision, download=download,
                                                         overrides=query.overrides))
    if query.node == VAE:
        from .components import vae

        return [vae.source(vae.Request(query.reference, query.revision, download=download))]
    return [locate(query.reference, component=query.component, weights_name=query.weights_name,
                   revision=query.revision, need_weights=query.weights == "load", download=download,
                   choices=choices_of(vars(query)))]

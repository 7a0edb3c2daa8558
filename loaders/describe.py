"""What a checkpoint is: architecture, quantization family, format of every layer, what is missing or contradictory.

Works from headers and config.json alone; no tensor bytes are read. Tensors decide; claims that disagree without
changing the numbers become notes, those that would change them become problems, and problems refuse the load.
"""

from __future__ import annotations

from ..host.texts import Text
from . import attention
from .architectures import Architecture, Dims, by_class_name, diffusers_classes, supported
from .architectures.passthrough import sizes
from .containers.checkpoint import Checkpoint
from .description import CheckpointDescription
from .errors import OtherKind
from .families import family_of
from .families.base import Family
from .families.reading import dims_of
from .plan import LoadPlan


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> CheckpointDescription:
    """Describe an opened checkpoint, of whichever family.

    `base` is the architecture and the sizes it must fit (an override's base model); where it is given, a config.json
    beside the weights is read for its quantization only. Raises CheckpointError when the files cannot be interpreted
    at all; everything else that forbids loading is listed in `problems`.
    """
    return read(checkpoint, base)[1].description


def read(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> tuple[Family, LoadPlan]:
    """The family of a checkpoint and the plan of its load, with the description in it; see `describe`."""
    family = family_of(checkpoint)
    plan = family.read(checkpoint, base)
    attention.note(plan.description, checkpoint)
    return family, plan


def is_derived(checkpoint: Checkpoint) -> bool:
    """Whether config.json's class is one that a derived table is of: its sizes are told by its weights."""
    return bool(diffusers_classes.of_class(diffusers_classes.class_of(checkpoint.config)))


def config_title(checkpoint: Checkpoint) -> str:
    """What config.json alone says a model is. Raises CheckpointError as `describe_config` does."""
    if is_derived(checkpoint):
        return dims_of(diffusers_classes.told, checkpoint, checkpoint.config).title
    return describe_config(checkpoint)[0].name


def describe_config(checkpoint: Checkpoint) -> tuple[Architecture, Dims]:
    """Architecture and sizes from config.json alone, for a model whose weights come from an override.

    Raises CheckpointError for classes this version does not load.
    """
    config, claim = checkpoint.config or {}, diffusers_classes.class_of(checkpoint.config)
    architecture = by_class_name(claim)
    if architecture is None and diffusers_classes.of_class(claim):
        model = dims_of(diffusers_classes.of_config, checkpoint, config)
        return model, sizes(model.network.identity)
    if architecture is None:
        raise OtherKind(Text("config.json says {claim}, not a transformer this version loads ({supported})",
                             claim=claim or Text("no _class_name"), supported=supported()),
                        checkpoint.source.config or checkpoint.source.reference,
                        Text("pick the folder of a supported base model"))
    return architecture, dims_of(architecture.dims_from_config, checkpoint, config)

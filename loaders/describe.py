"""What a checkpoint is: architecture, quantization family, format of every layer, what is missing or contradictory.

Works from headers and config.json alone; no tensor bytes are read. Tensors decide; claims that disagree without
changing the numbers become notes, those that would change them become problems, and problems refuse the load.
"""

from __future__ import annotations

from . import attention
from .architectures import Architecture, Dims, by_class_name, supported
from .containers.checkpoint import Checkpoint
from .description import CheckpointDescription
from .errors import CheckpointError
from .families import family_of
from .families.reading import dims_of


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> CheckpointDescription:
    """Describe an opened checkpoint, of whichever family.

    `base` is the architecture and the sizes it must fit (an override's base model); where it is given, a config.json
    beside the weights is read for its quantization only. Raises CheckpointError when the files cannot be interpreted
    at all; everything else that forbids loading is listed in `problems`.
    """
    description = family_of(checkpoint).describe(checkpoint, base)
    attention.note(description, checkpoint)
    return description


def describe_config(checkpoint: Checkpoint) -> tuple[Architecture, Dims]:
    """Architecture and sizes from config.json alone, for a model whose weights come from an override.

    Raises CheckpointError for classes this version does not load.
    """
    config = checkpoint.config or {}
    claim = str(config.get("_class_name") or "")
    architecture = by_class_name(claim)
    if architecture is None:
        raise CheckpointError(f"config.json says {claim or 'no _class_name'}, not a transformer this version loads "
                              f"({supported()})", checkpoint.source.config or checkpoint.source.reference,
                              "pick the folder of a supported base model")
    return architecture, dims_of(architecture.dims_from_config, checkpoint, config)

"""An SVDQuant file, read: its plan and what it is, for reports, the Inspect node and the loader."""

from __future__ import annotations

import os

from ....host.texts import Text
from ...architectures import Architecture, Dims, Naming
from ...containers.checkpoint import Checkpoint
from ...description import CheckpointDescription
from ...errors import CheckpointError
from ...plan import LoadPlan
from ..reading import check_dims
from .claims import claim_notes, config_only
from .convert import load_plan
from .files import LEGACY
from .lite import read_lite
from .plan import AWQ, W4A4, make_plan
from .recognise import recognise, refuse_other_layouts
from .writers import LITE, NUNCHAKU, VLLM, writer_of


def read_svdquant(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> LoadPlan:
    """base.Family.read for a file of SVDQuant layers.

    `base` is the architecture and the sizes it must fit. Raises CheckpointError, naming what it is, for every file that
    is not one of the families that load; what else forbids loading is in `problems`.
    """
    refuse_other_layouts(checkpoint)
    writer = writer_of(checkpoint)
    if writer == LITE:
        return read_lite(checkpoint, base)
    found = recognise(checkpoint, writer)
    architecture = found.family.architecture
    try:
        dims = architecture.dims_from_tensors(found.tensors, Naming("diffusers"))
    except ValueError as error:
        half = [header.path for header in checkpoint.headers if os.path.basename(header.path) in LEGACY]
        do = Text("give the folder, which holds {file} as well", file=LEGACY[1]) if len(half) == 1 else \
            Text("download it again")
        raise CheckpointError(error, checkpoint.source.reference, do) from error
    told = config_only(checkpoint, found) if base is None else {}
    untold = [key for key in sorted(architecture.config_only) if key not in dims]
    dims |= {key: told[key] for key in untold if key in told}
    style = Text("Nunchaku's {style}", style=found.style) if writer == NUNCHAKU else Text("vLLM-Omni's")
    description = CheckpointDescription(
        checkpoint.source.reference, [os.path.basename(header.path) for header in checkpoint.headers],
        checkpoint.bytes_on_disk, architecture.name, Naming(style, found.prefix), dims,
        f"svdquant-{found.precision}", ranks=list(found.ranks), producer="" if writer == NUNCHAKU else writer)
    if writer == VLLM:
        description.notes.append(Text("written by {writer}: weights in row-major order, not in Nunchaku's; how the "
                                      "vectors beside them lie, their values are asked when it is loaded",
                                      writer=writer))
    if checkpoint.source.choice:
        description.notes.append(checkpoint.source.choice)
    if base is not None:
        check_dims(description, *base)
    description.notes += [Text("{key} is told by neither the tensors nor a config; taken as off. If this is a model "
                               "that has it, use the file as weights on its base", key=key)
                          for key in untold if key not in dims]
    plan = make_plan(found, description.dims)
    description.problems += plan.problems
    description.notes += claim_notes(checkpoint, found, plan, description.dims)
    names = {name: AWQ if layer.entry.awq else W4A4[found.precision] for name, layer in plan.layers.items()}
    return load_plan(found, plan, description, names)

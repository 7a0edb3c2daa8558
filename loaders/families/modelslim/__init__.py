"""Checkpoints written by msmodelslim for Ascend (specs/ascend.md): quant_model_description*.json beside the weights.

files.py finds them, description.py reads the types, names.py the tensor names, layers.py holds both against the
architecture, native.py makes the native tensors; saved.py reads back what ComfyUI's save nodes write of such a model.
The functions here are what the rest of the loaders call. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...architectures import Architecture, Dims
    from ...assemble import NativeStateDict
    from ...containers.checkpoint import Checkpoint
    from ...describe import CheckpointDescription
    from ...model import Loaded, Request

# Of the layer map: INT8 blues, INT4 greens, FP8 and MXFP8 oranges, MXFP4 violets.
COLOURS = {"W8A8": (70, 110, 200), "W8A8_DYNAMIC": (90, 150, 220), "W8A16": (140, 180, 225),
           "W4A4_DYNAMIC": (80, 170, 90), "W4A8_DYNAMIC": (130, 195, 110), "WFP8AFP8_DYNAMIC": (225, 165, 60),
           "W8A8_MXFP8": (235, 130, 60), "W4A8_MXFP": (190, 120, 200), "MXFP4": (150, 90, 190),
           "W4A4_MXFP4": (150, 90, 190), "W4A4_MXFP4_DUALSCALE": (115, 70, 170)}


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an export of msmodelslim, or was saved from one by ComfyUI."""
    from .description import description_path
    from .saved import is_saved

    return description_path(checkpoint.source) is not None or is_saved(checkpoint.tensors)


def describe(checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None = None) -> CheckpointDescription:
    """loaders.describe.describe for a checkpoint that is ours."""
    from . import layers, saved
    from .description import description_path

    module = layers if description_path(checkpoint.source) else saved
    return module.describe(checkpoint, base)


def prepare(checkpoint: Checkpoint, description: CheckpointDescription, compute: str,
            quiet: bool) -> tuple[NativeStateDict, Any]:
    """Native tensors and the host's operations for a checkpoint that is ours; see native.prepare."""
    from .native import prepare as make

    return make(checkpoint, description, compute, quiet)


def load(request: Request) -> Loaded:
    """A MODEL of an export. Raises CheckpointError as loaders.model.load does, and for a checkpoint of another kind."""
    from ... import model
    from ...errors import CheckpointError
    from ...files.places import locate
    from .description import description_path

    source = locate(request.reference, component=request.component, weights_name=request.weights_name,
                    revision=request.revision, download=request.download)
    if description_path(source) is None:
        raise CheckpointError("there is no quant_model_description*.json, so this is no ModelSlim checkpoint",
                              source.folder, "give the folder of an export; Load Base Model loads other checkpoints")
    return model.load(request)

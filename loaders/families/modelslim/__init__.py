"""Checkpoints written by msmodelslim for Ascend: quant_model_description*.json beside the weights.

files.py finds them, description.py reads the types, names.py the tensor names, layers.py holds both against the
architecture. What ComfyUI's save nodes write of such a model is read by comfy.py.
Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...errors import CheckpointError
from ...files.selection import Folder, Selection
from ..base import Family
from . import files

if TYPE_CHECKING:
    from ...architectures import Architecture, Dims
    from ...containers.checkpoint import Checkpoint
    from ...description import CheckpointDescription
    from ...plan import LoadPlan

# Of the layer map: INT8 blues, INT4 greens, FP8 and MXFP8 oranges, MXFP4 violets.
COLOURS = {"W8A8": (70, 110, 200), "W8A8_DYNAMIC": (90, 150, 220), "W8A16": (140, 180, 225),
           "W4A4_DYNAMIC": (80, 170, 90), "W4A8_DYNAMIC": (130, 195, 110), "WFP8AFP8_DYNAMIC": (225, 165, 60),
           "W8A8_MXFP8": (235, 130, 60), "W4A8_MXFP": (190, 120, 200), "MXFP4": (150, 90, 190),
           "W4A4_MXFP4": (170, 80, 150), "W4A4_MXFP4_DUALSCALE": (115, 70, 170)}


class ModelSlim(Family):
    """See base.Family."""

    name = "modelslim"
    kind = "modelslim"
    title = "ModelSlim"
    published = files.KNOWN

    def badge(self, reference: str) -> str:
        return "ModelSlim W8A8"

    def usual_formats(self, reference: str) -> tuple[str, ...]:
        return ("W8A8_DYNAMIC",)

    def colours(self) -> Mapping[str, tuple[int, int, int]]:
        return COLOURS

    def side_file(self, name: str) -> bool:
        return files.is_description(name)

    def local_references(self) -> list[str]:
        return files.local_folders()

    def select(self, folder: Folder, component: str, weights_name: str, choices: Any) -> Selection | None:
        return files.select(folder, component, weights_name)

    def reads_beside(self, path: str) -> bool:
        return files.has_description(Path(path))

    def recognise(self, checkpoint: Checkpoint) -> bool:
        from .description import description_path

        return description_path(checkpoint.source) is not None

    def require(self, checkpoint: Checkpoint, description: CheckpointDescription, choices: Any) -> None:
        from .description import description_path

        if description_path(checkpoint.source) is None:
            raise CheckpointError(Text("there is no quant_model_description*.json, so this is no ModelSlim checkpoint"),
                                  checkpoint.source.folder,
                                  Text("give the folder of an export; Load Base Model loads other checkpoints"))

    def read(self, checkpoint: Checkpoint, base: tuple[Architecture, Dims] | None) -> LoadPlan:
        from .layers import read_plan

        return read_plan(checkpoint, base)


FAMILY = ModelSlim()

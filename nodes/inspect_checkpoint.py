"""Inspect Checkpoint."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.texts import said
from ..loaders.families.nunchaku.files import KNOWN
from ..loaders.families.repos import OVERRIDES
from ..loaders.local import MAYBE, TRANSFORMER, Local
from ..loaders.locate import KNOWN_BASES
from . import inputs


def _fit(one: Local) -> int | None:
    """Everything, transformers first."""
    return one.fits.get(TRANSFORMER, MAYBE)


class QT_InspectCheckpoint(io.ComfyNode):
    """Say what a checkpoint is without loading it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_InspectCheckpoint", display_name="Inspect Checkpoint", category=inputs.CATEGORY,
            is_output_node=True,
            description="Reads the headers of a checkpoint (no weights) and says what it is: architecture, "
                        "quantization, the format of every layer, and what would refuse to load.",
            search_aliases=["what is this model", "checkpoint info", "layer map", "quantization"],
            inputs=[
                inputs.checkpoints("checkpoint", _fit, (*OVERRIDES, *KNOWN, *KNOWN_BASES),
                                   tooltip="All that ComfyUI's model folders hold, transformers first, and known repo "
                                           "ids."),
                inputs.reference(),
                io.String.Input("weights_name", optional=True, default="", advanced=True,
                                tooltip="File inside the folder or repo, where there are several."),
            ],
            outputs=[io.String.Output("report", display_name="report"),
                     io.Image.Output("layer_map", display_name="layer map",
                                     tooltip="Rows are blocks, columns modules, the colour is the stored format.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, checkpoint: str = "", reference: str = "") -> bool | str:
        return inputs.ready(cls, checkpoint, (*OVERRIDES, *KNOWN, *KNOWN_BASES), reference)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", reference: str = "", **kwargs) -> str:
        return inputs.fingerprint(checkpoint, reference, **kwargs)

    @classmethod
    def execute(cls, checkpoint: str = "", reference: str = "", weights_name: str = "") -> io.NodeOutput:
        import numpy
        import torch

        from ..loaders.containers.checkpoint import Checkpoint
        from ..loaders.describe import describe
        from ..loaders.locate import locate
        from ..loaders.report import describe_report
        from ..views.layer_map import layer_map

        description = describe(Checkpoint(locate(inputs.chosen(reference, checkpoint), weights_name=weights_name)))
        report = said(describe_report(description))
        picture = torch.from_numpy(numpy.asarray(layer_map(description), dtype=numpy.float32) / 255)[None]
        shown = {**ui.PreviewText(report).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(report, picture, ui=shown)

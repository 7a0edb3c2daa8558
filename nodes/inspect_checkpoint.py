"""Inspect Checkpoint."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import inputs


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
                inputs.checkpoints("checkpoint", "anything",
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
    async def validate_inputs(cls, checkpoint: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, checkpoint, "anything", reference)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", reference: str = "", **kwargs) -> str:
        from . import checks

        return checks.fingerprint(checkpoint, reference, **kwargs)

    @classmethod
    def execute(cls, checkpoint: str = "", reference: str = "", weights_name: str = "") -> io.NodeOutput:
        import numpy
        import torch

        from ..host.texts import said
        from ..loaders.containers.checkpoint import Checkpoint
        from ..loaders.describe import describe
        from ..loaders.locate import locate
        from ..loaders.report import describe_report
        from ..views.layer_map import layer_map
        from . import checks

        description = describe(Checkpoint(locate(checks.chosen(reference, checkpoint), weights_name=weights_name)))
        report = said(describe_report(description))
        picture = torch.from_numpy(numpy.asarray(layer_map(description), dtype=numpy.float32) / 255)[None]
        shown = {**ui.PreviewText(report).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(report, picture, ui=shown)

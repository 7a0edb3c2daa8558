"""Save Quantized Model."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_SaveQuantizedModel(io.ComfyNode):
    """A MODEL's transformer as one .safetensors file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_SaveQuantizedModel", display_name="Save Quantized Model",
            category=f"{inputs.CATEGORY}/build", is_output_node=True,
            description="Writes the MODEL, with its LoRAs, as one native .safetensors file that ComfyUI loads without "
                        "this pack wherever it has the formats. Quantized weights keep their bytes.",
            search_aliases=["save model", "export quantized", "single file", "ModelSave", "safetensors", "bake lora"],
            inputs=[
                io.Model.Input("model", tooltip="From any loader. LoRAs on it are saved with it."),
                io.String.Input("filename", default="diffusion_models/quantized",
                                tooltip="Below ComfyUI's output folder; what is in diffusion_models there shows in the "
                                        "loaders' lists. Or a full path in a model folder. .safetensors is added."),
                io.Combo.Input("format", options=["exact", "stock", "baked"], default="exact",
                               tooltip="exact: every layer as it is, LoRAs beside quantized weights; the report says "
                                       "when that needs this pack. stock: a file for ComfyUI without this pack, in "
                                       "which layers that it has no format for, and quantized ones with a LoRA, become "
                                       "16 bits. baked: quantized layers with a LoRA are quantized again, which loses "
                                       "some of it; small."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of this name. Off: refuse."),
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        from ..loaders.errors import CheckpointError
        from ..makers.save import target_file
        from . import checks

        if filename is None:  # from another node: known when it runs
            return True
        try:
            target_file(checks.new_name(filename))
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, filename: str, format: str = "exact", overwrite: bool = False) -> io.NodeOutput:
        from ..makers.save import save
        from . import checks

        _, report = save(model, checks.new_name(filename), format, overwrite)
        return inputs.reported(report)

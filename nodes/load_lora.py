"""Load LoRA for Transformer, Keep Weights Decoded: what is put on a MODEL that is loaded."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_LoadLoRA(io.ComfyNode):
    """A MODEL with a LoRA, in ComfyUI's names or in diffusers'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_LoadLoRA", display_name="Load LoRA for Transformer", category=inputs.CATEGORY,
            description="Loads a LoRA on any transformer, also one in diffusers' names where ComfyUI's own node leaves "
                        "them away (Wan, HunyuanVideo, LTX-Video, Lumina 2, Cosmos, Mochi ...), at the scale that "
                        "diffusers saved with it. Says what it has no layer for, and refuses one for another model.",
            search_aliases=["lora", "diffusers lora", "peft", "lora loader", "wan lora", "hunyuanvideo lora"],
            inputs=[
                io.Model.Input("model", tooltip="From any loader, quantized or not."),
                inputs.Listed("lora", "LoRAs", optional=True, tooltip="A file of ComfyUI's folder loras."),
                io.Float.Input("strength", optional=True, default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="How much of it; may be negative. 0: the MODEL as it is."),
                io.String.Input("path", optional=True, default="",
                                tooltip="The path of a .safetensors file, or its name in the folder loras. When it is "
                                        "not empty it wins over the list."),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, lora: str | None = None, path: str | None = "") -> bool | str:
        from ..loaders import loras
        from ..loaders.errors import CheckpointError

        if path is None or lora is None and not path.strip():  # by a link
            return True
        try:
            loras.find(lora, path)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", path: str = "", strength: float = 1.0, model=None) -> str:
        from ..loaders import loras

        return f"{loras.stamp(loras.find(lora, path))} {strength}"

    @classmethod
    def execute(cls, model, lora: str = "", strength: float = 1.0, path: str = "") -> io.NodeOutput:
        from ..loaders import loras

        return inputs.loaded(*loras.apply(model, loras.find(lora, path), strength))


class QT_KeepDecoded(io.ComfyNode):
    """A MODEL that keeps decoded weights in free memory while it samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_KeepDecoded", display_name="Keep Weights Decoded", category=inputs.CATEGORY,
            description="Speed for memory: while the MODEL samples, quantized layers that are decoded for every "
                        "product keep the decoded weight in memory that is free, the largest first. The numbers stay. "
                        "Nothing is kept after the run.",
            search_aliases=["decoded cache", "dequantize once", "speed over memory", "faster sampling", "vram"],
            inputs=[
                io.Model.Input("model", tooltip="From a loader of this pack, with LoRAs or without. Not changed."),
                io.Float.Input("most_gb", optional=True, default=0.0, min=0.0, max=1024.0, step=0.1,
                               tooltip="How many GB decoded weights may take at most. 0: all that is free beside what "
                                       "ComfyUI and a sampling step need."),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")])

    @classmethod
    def execute(cls, model, most_gb: float = 0.0) -> io.NodeOutput:
        from ..loaders import kept

        return inputs.loaded(*kept.apply(model, most_gb))

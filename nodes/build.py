"""Nodes that write checkpoints."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_RepackModelSlimWan(io.ComfyNode):
    """A ModelSlim export of Wan in a diffusers repo, and back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_RepackModelSlimWan", display_name="Repack ModelSlim Wan", category=f"{inputs.CATEGORY}/build",
            is_output_node=True,
            description="Writes a ModelSlim export of Wan2.x, which has the vendor's names, as a diffusers repo: both "
                        "transformers and their descriptions renamed, everything else from the base; or the inverse. "
                        "Data are copied byte for byte.",
            search_aliases=["wan_repack", "ascend", "msmodelslim", "diffusers layout", "convert wan"],
            inputs=[
                io.String.Input("source", default="",
                                tooltip="The export: a folder with high_noise_model and low_noise_model, or of a "
                                        "single model. A path, or a repo id that is on this machine."),
                io.String.Input("base", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
                                tooltip="The diffusers repo that config.json, VAE, text encoder and the rest come "
                                        "from. To original: the vendor's repo, or nothing."),
                io.String.Input("output", default="",
                                tooltip="A new folder. A relative path is below models/diffusers_components."),
                io.Combo.Input("direction", options=["to diffusers", "to original"], default="to diffusers",
                               tooltip="to diffusers: the vendor's names become diffusers'. to original: the inverse."),
                io.Combo.Input("link", options=["link", "copy"], default="link",
                               tooltip="What of the base is not a transformer: links to its files, or copies."),
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, source: str = "", base: str = "", output: str | None = None,
                        direction: str = "to diffusers") -> bool | str:
        from ..loaders.errors import CheckpointError
        from ..loaders.files.places import cleaned
        from ..makers.publish import target_folder
        from . import checks

        needed = {"source": source} if direction == "to original" and base is not None and not cleaned(base) \
            else {"source": source, "base": base}
        try:
            checks.check_new(output, needed, target_folder)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, source: str, base: str, output: str, direction: str = "to diffusers",
                link: str = "link") -> io.NodeOutput:
        from ..makers.repack_wan import repack
        from . import checks

        report = repack(source, base, checks.new_name(output), direction, link == "link")
        return inputs.reported(report)


class QT_BuildGGUF(io.ComfyNode):
    """A transformer in BF16, F16 or F32 as one GGUF file, under the model's own names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_BuildGGUF", display_name="Build GGUF Transformer", category=f"{inputs.CATEGORY}/build",
            is_output_node=True,
            description="Writes a transformer in BF16, F16 or F32 as one GGUF file for this pack's loaders and "
                        "ComfyUI-GGUF's, as ComfyUI-GGUF's own tools would.",
            search_aliases=["gguf", "q8_0", "q4_0", "ggml", "quantize", "convert", "build transformer"],
            inputs=[
                io.String.Input("base", default="",
                                tooltip="The transformer, or its pipeline: a diffusers folder, a single file with "
                                        "ComfyUI's names, or a repo id that is on this machine."),
                io.String.Input("output", default="",
                                tooltip="A new .gguf file. A relative path is below models/diffusers_components, where "
                                        "the loader nodes list it; ComfyUI-GGUF looks in models/diffusion_models."),
                inputs.Listed("type", "GGUF_types",
                               tooltip="Of the quantized weights. Q8_0: 8.5 bits a weight, nearly the original. Q5 and "
                                       "Q4: smaller; _1 has an offset a block. TQ: only for models of three values. "
                                       "BF16, F16: nothing is quantized."),
                inputs.Listed("model_type", "model_types",
                               tooltip="Which layers stay in 16 bits. auto: those that ComfyUI-GGUF's tools leave "
                                       "(embedders, the last layers). A name: also those that Build FP8 Transformer "
                                       "leaves with it. none: no layers."),
                io.String.Input("keep_patterns", default="", multiline=True, optional=True,
                                tooltip="More layers that stay in 16 bits: regular expressions searched in the model's "
                                        "own module names, one a line."),
                io.Boolean.Input("overwrite", default=False, optional=True, advanced=True,
                                 tooltip="Replace the GGUF file that is there, once the new one is whole."),
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, base: str = "", keep_patterns: str = "", output: str | None = None,
                        overwrite: bool = False) -> bool | str:
        from ..loaders.errors import CheckpointError
        from ..makers.builders.gguf_file import target_file
        from ..makers.builders.options import one_a_line
        from ..makers.builders.presets import compiled
        from . import checks

        try:
            compiled(one_a_line(keep_patterns or ""))
            checks.check_new(output, {"base": base}, lambda name, read: target_file(name, read, overwrite is not False))
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, base: str, output: str, type: str = "Q8_0", model_type: str = "auto", keep_patterns: str = "",
                overwrite: bool = False) -> io.NodeOutput:
        from ..makers.builders.gguf import build_gguf
        from ..makers.builders.options import one_a_line
        from . import checks

        built = build_gguf(base=base, output=checks.new_name(output), kind=type, model_type=model_type,
                           keep_patterns=one_a_line(keep_patterns), overwrite=overwrite)
        return inputs.reported(built.report)

"""Nodes that make quantized transformers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs

CATEGORY = f"{inputs.CATEGORY}/build"
SHARD_SIZE = "5GB"  # makers/builders/options.py has it, too


def _shared() -> list[Any]:
    """Inputs of both nodes: export, base, output, shard size, overwrite."""
    return [
        io.String.Input("modelopt_export", default="",
                        tooltip="nvidia-modelopt's diffusers export (its --hf-ckpt-dir, or the transformer folder in "
                                "it): a path, or a repo id that is on this machine. Empty: the base is quantized, "
                                "without calibration."),
        io.String.Input("base", default="",
                        tooltip="The BF16 transformer that the export was made from, or its pipeline: layers that stay "
                                "in BF16 come from it."),
        io.String.Input("output", default="", tooltip="A new folder. A relative path is below "
                                                      "models/diffusers_components, where the loader nodes list it."),
        io.String.Input("max_shard_size", default=SHARD_SIZE, optional=True, advanced=True,
                        tooltip="Largest weight file, such as 5GB or 500MB. An index is always written."),
        io.Boolean.Input("overwrite", default=False, optional=True, advanced=True,
                         tooltip="Replace the model that is in the output folder, once the new one is whole."),
    ]


def _check(references: tuple[str | None, ...], patterns: str | None, max_shard_size: str | None,
           output: str | None, overwrite: bool | None) -> bool | str:
    """validate_inputs; None is what comes by a link, and is looked at when the node runs."""
    from ..host.texts import Text
    from ..loaders.errors import CheckpointError
    from ..loaders.files.places import cleaned, find_path
    from ..makers.builders.options import one_a_line, shard_bytes
    from ..makers.builders.presets import compiled
    from ..makers.publish import target_folder
    from . import checks

    for reference in references:
        found = checks.check_reference(reference)
        if found is not True:
            return found
    try:
        if not any(reference is None or cleaned(reference) for reference in references):
            raise CheckpointError(Text("neither a ModelOpt export nor a base is given"), "",
                                  Text("give one of them, or both"))
        compiled(one_a_line(patterns or ""))
        shard_bytes(SHARD_SIZE if max_shard_size is None else max_shard_size)
        if output is not None:
            target_folder(checks.new_name(output), [find_path(cleaned(reference)) for reference in references
                                                    if reference and cleaned(reference)], overwrite is not False)
    except CheckpointError as error:
        return str(error)
    return True


class QT_BuildFP8Transformer(io.ComfyNode):
    """A ModelOpt FP8 export and its base, or a BF16 base alone, as a transformer override."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        export, base, output, shard, overwrite = _shared()
        return io.Schema(
            node_id="QT_BuildFP8Transformer", display_name="Build FP8 Transformer", category=CATEGORY,
            is_output_node=True,
            description="Writes an FP8 transformer folder for Apply Transformer Override and SGLang-Diffusion: from an "
                        "nvidia-modelopt FP8 export and its BF16 base, or straight from the base.",
            search_aliases=["modelopt", "fp8", "quantize", "convert", "build transformer", "e4m3"],
            inputs=[
                export,
                io.String.Input("backbone", default="",
                                tooltip="backbone.pt, or its folder (ModelOpt's --quantized-torch-ckpt-save-path). "
                                        "Needed only when the export carries no scales."),
                base, output,
                inputs.Listed("model_type", "model_types",
                               tooltip="Which layers stay in BF16, as SGLang-Diffusion validated them. auto: by "
                                       "_class_name in config.json. wan22 is for the first transformer only."),
                io.String.Input("keep_bf16_patterns", default="", multiline=True, optional=True,
                                tooltip="More layers that stay in BF16: regular expressions searched in module names, "
                                        "one a line."),
                io.Float.Input("maxbound", default=448.0, min=1.0, max=448.0, step=1.0, optional=True, advanced=True,
                               tooltip="What the largest value of a tensor is divided by to get its scale. 448 is "
                                       "E4M3's largest number; smaller leaves headroom."),
                shard, overwrite,
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, modelopt_export: str = "", backbone: str = "", base: str = "", output: str | None = None,
                        keep_bf16_patterns: str = "", max_shard_size: str = SHARD_SIZE,
                        overwrite: bool = False) -> bool | str:
        return _check((modelopt_export, backbone, base), keep_bf16_patterns, max_shard_size, output, overwrite)

    @classmethod
    def execute(cls, modelopt_export: str, backbone: str, base: str, output: str, model_type: str = "auto",
                keep_bf16_patterns: str = "", maxbound: float = 448.0, max_shard_size: str = SHARD_SIZE,
                overwrite: bool = False) -> io.NodeOutput:
        from ..makers.builders.fp8 import build_fp8
        from ..makers.builders.options import one_a_line, shard_bytes
        from . import checks

        built = build_fp8(output_dir=checks.new_name(output), modelopt_hf_dir=modelopt_export,
                          modelopt_backbone_ckpt=backbone, base_transformer_dir=base, model_type=model_type,
                          keep_bf16_patterns=one_a_line(keep_bf16_patterns), maxbound=maxbound,
                          shard_bytes=shard_bytes(max_shard_size), overwrite=overwrite)
        return inputs.reported(built.report)


class QT_BuildNVFP4Transformer(io.ComfyNode):
    """A ModelOpt NVFP4 export and its base, or a BF16 base alone, as a mixed transformer override."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        export, base, output, shard, overwrite = _shared()
        return io.Schema(
            node_id="QT_BuildNVFP4Transformer", display_name="Build NVFP4 Transformer", category=CATEGORY,
            is_output_node=True,
            description="Writes a mixed BF16 and NVFP4 transformer folder for Apply Transformer Override and "
                        "SGLang-Diffusion: from an nvidia-modelopt NVFP4 export and its BF16 base, or straight from "
                        "the base.",
            search_aliases=["modelopt", "nvfp4", "fp4", "quantize", "convert", "build transformer", "blackwell"],
            inputs=[
                export, base, output,
                inputs.Listed("pattern_preset", "pattern_presets",
                               tooltip="Which layers stay in BF16. flux1-nvfp4: the set that SGLang-Diffusion "
                                       "validated for FLUX.1."),
                io.String.Input("keep_bf16_patterns", default="", multiline=True, optional=True,
                                tooltip="More layers that stay in BF16: patterns with * for anything, compared with "
                                        "whole module names, one a line."),
                io.Boolean.Input("swap_weight_nibbles", default=False, optional=True, advanced=True,
                                 tooltip="Written into config.json: whether even columns are in the high nibble. "
                                         "ModelOpt's exports have them in the low one: off."),
                shard, overwrite,
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, modelopt_export: str = "", base: str = "", output: str | None = None,
                        max_shard_size: str = SHARD_SIZE, overwrite: bool = False) -> bool | str:
        return _check((modelopt_export, base), "", max_shard_size, output, overwrite)

    @classmethod
    def execute(cls, modelopt_export: str, base: str, output: str, pattern_preset: str = "none",
                keep_bf16_patterns: str = "", swap_weight_nibbles: bool = False, max_shard_size: str = SHARD_SIZE,
                overwrite: bool = False) -> io.NodeOutput:
        from ..makers.builders.nvfp4 import build_nvfp4
        from ..makers.builders.options import one_a_line, shard_bytes
        from . import checks

        built = build_nvfp4(output_dir=checks.new_name(output), modelopt_hf_dir=modelopt_export,
                            base_transformer_dir=base, pattern_preset=pattern_preset,
                            keep_bf16_patterns=one_a_line(keep_bf16_patterns),
                            swap_weight_nibbles=swap_weight_nibbles, shard_bytes=shard_bytes(max_shard_size),
                            overwrite=overwrite)
        return inputs.reported(built.report)

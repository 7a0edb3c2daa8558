"""Load Base Text Encoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders.locate import KNOWN_BASES
from . import inputs


class QT_LoadBaseTextEncoder(io.ComfyNode):
    """The text encoders and tokenizers of a diffusers pipeline, or of a whole checkpoint, as an ordinary CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_LoadBaseTextEncoder", display_name="Load Base Text Encoder", category=inputs.CATEGORY,
            description="Loads the text encoders of a diffusers folder (sharded too) as an ordinary CLIP: those that "
                        "model_index.json names, with the tokenizers beside them. Or those of an all-in-one "
                        "checkpoint.",
            search_aliases=["diffusers folder", "clip loader", "t5", "umt5", "llama", "qwen", "mistral", "sharded"],
            inputs=[
                io.Combo.Input("base_model", options=inputs.reference_choices(KNOWN_BASES),
                               tooltip="What ComfyUI's model folders (diffusers, diffusion_models, checkpoints) hold, "
                                       "and the known repo ids. It must be a whole pipeline folder (with "
                                       "model_index.json) or an all-in-one checkpoint."),
                inputs.reference(),
                io.Combo.Input("dtype", options=["default", "bf16", "fp16", "fp32"], default="default", optional=True,
                               advanced=True, tooltip="Precision to keep the weights in. default: what ComfyUI picks "
                                                      "for the file. It always computes text in fp32."),
                inputs.revision(),
                inputs.download_missing(),
            ],
            outputs=[io.Clip.Output(), io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, base_model: str = "", reference: str = "", download_missing: bool = False) -> bool | str:
        return inputs.check_choice(base_model, KNOWN_BASES, reference, download_missing)

    @classmethod
    def fingerprint_inputs(cls, base_model: str = "", reference: str = "", **kwargs) -> str:
        from ..loaders.components import text_encoder

        request = text_encoder.Request(inputs.chosen(reference, base_model), kwargs.get("revision", ""))
        return inputs.stamp(lambda: [path for part in text_encoder.sources(request) for path in part.paths],
                            base_model, reference, sorted(kwargs.items(), key=str))

    @classmethod
    def execute(cls, base_model: str, reference: str = "", dtype: str = "default", revision: str = "",
                download_missing: bool = False) -> io.NodeOutput:
        from ..loaders.components import text_encoder

        loaded = text_encoder.load(text_encoder.Request(inputs.chosen(reference, base_model), revision, dtype,
                                                        download_missing))
        return io.NodeOutput(loaded.clip, loaded.report)

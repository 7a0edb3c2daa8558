"""Load Base Text Encoder, Load Base VAE: what a pipeline holds beside its transformer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs

OVERRIDE_TIP = inputs.REFERENCE_TIP.replace(".safetensors file or index", ".safetensors or .gguf file, index")


class QT_LoadBaseTextEncoder(io.ComfyNode):
    """The text encoders and tokenizers of a diffusers pipeline, or of a whole checkpoint, as an ordinary CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_LoadBaseTextEncoder", display_name="Load Base Text Encoder", category=inputs.CATEGORY,
            description="Loads the text encoders of a diffusers folder (sharded too) as an ordinary CLIP: those that "
                        "model_index.json names, with the tokenizers beside them. Or those of an all-in-one "
                        "checkpoint.",
            search_aliases=["diffusers folder", "clip loader", "t5", "umt5", "llama", "qwen", "mistral", "sharded",
                            "gguf clip", "quantized text encoder"],
            inputs=[
                inputs.checkpoints("base_model", "text_encoders_of_bases",
                                   tooltip="Whole pipeline folders (with model_index.json) in ComfyUI's model folders "
                                           "(diffusers), what can be an all-in-one checkpoint, and the known repo "
                                           "ids."),
                inputs.reference(),
                io.Combo.Input("dtype", options=["default", "bf16", "fp16", "fp32"], default="default", optional=True,
                               advanced=True, tooltip="Precision to keep the weights in. default: what ComfyUI picks "
                                                      "for the file. It always computes text in fp32."),
                inputs.revision(),
                inputs.download_missing(),
                *_override("override", tooltip="A text encoder that takes the place of one of the base's: a GGUF or "
                           "safetensors file, a folder of transformers, or a whole pipeline. Which one it replaces is "
                           "told by what is in it. Tokenizers are always the base's."),
                *_override("override_2", tooltip="The same for another one of the base's text encoders, or for the "
                           "mmproj file of a GGUF (the eyes of Qwen2.5-VL)."),
            ],
            outputs=[io.Clip.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, base_model: str = "", reference: str = "", override: str = "",
                        override_2: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, base_model, "text_encoders_of_bases", reference)

    @classmethod
    def fingerprint_inputs(cls, base_model: str = "", reference: str = "", **kwargs) -> str:
        from ..loaders.components import overrides, text_encoder
        from . import checks

        request = text_encoder.Request(checks.chosen(reference, base_model), kwargs.get("revision", ""),
                                       overrides=overrides.chosen(kwargs))
        return checks.stamp(lambda: [path for part in text_encoder.sources(request) for path in part.paths],
                            base_model, reference, sorted(kwargs.items(), key=str))

    @classmethod
    def execute(cls, base_model: str = "", reference: str = "", dtype: str = "default", revision: str = "",
                download_missing: bool = False, **others: str) -> io.NodeOutput:
        from ..loaders.components import overrides, text_encoder
        from . import checks

        loaded = text_encoder.load(text_encoder.Request(checks.chosen(reference, base_model), revision, dtype,
                                                        download_missing, overrides.chosen(others)))
        return inputs.loaded(loaded.clip, loaded.report)


def _override(name: str, tooltip: str) -> tuple[Any, Any]:
    """The list and the free reference that wins over it."""
    return (inputs.checkpoints(name, "text_encoders", tooltip),
            io.String.Input(f"{name}_reference", optional=True, default="", tooltip=OVERRIDE_TIP))


class QT_LoadBaseVAE(io.ComfyNode):
    """The VAE of a diffusers pipeline, a VAE folder, a single file, or a whole checkpoint, as an ordinary VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_LoadBaseVAE", display_name="Load Base VAE", category=inputs.CATEGORY,
            description="Loads the VAE of a diffusers folder (sharded too), of a single file or of an all-in-one "
                        "checkpoint as an ordinary VAE, after checking that a diffusers VAE scales latents as "
                        "ComfyUI's model of that family does.",
            search_aliases=["diffusers folder", "load vae", "autoencoder", "sharded"],
            inputs=[
                inputs.checkpoints("base_model", "VAEs",
                                   tooltip="The diffusers base whose vae is loaded, or a VAE: what ComfyUI's model "
                                           "folders (diffusers, vae, checkpoints) hold of them, and the known repo "
                                           "ids."),
                inputs.reference(),
                io.Combo.Input("dtype", options=["default", "bf16", "fp16", "fp32"], default="default", optional=True,
                               advanced=True, tooltip="Precision to compute in. default: what ComfyUI picks for the "
                                                      "device and this VAE."),
                inputs.revision(),
                inputs.download_missing(),
            ],
            outputs=[io.Vae.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, base_model: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, base_model, "VAEs", reference)

    @classmethod
    def fingerprint_inputs(cls, base_model: str = "", reference: str = "", **kwargs) -> str:
        from ..loaders.components import vae
        from . import checks

        request = vae.Request(checks.chosen(reference, base_model), kwargs.get("revision", ""))
        return checks.stamp(lambda: vae.source(request).paths, base_model, reference, sorted(kwargs.items(), key=str))

    @classmethod
    def execute(cls, base_model: str = "", reference: str = "", dtype: str = "default", revision: str = "",
                download_missing: bool = False) -> io.NodeOutput:
        from ..loaders.components import vae
        from . import checks

        loaded = vae.load(vae.Request(checks.chosen(reference, base_model), revision, dtype, download_missing))
        return inputs.loaded(loaded.vae, loaded.report)

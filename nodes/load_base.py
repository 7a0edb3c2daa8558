"""Load Base Model."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_LoadBaseModel(io.ComfyNode):
    """A diffusers pipeline or transformer folder, or a single file, as an ordinary MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_LoadBaseModel", display_name="Load Base Model", category=inputs.CATEGORY,
            description="Loads the transformer of a diffusers folder (sharded too) or a single file as an ordinary "
                        "MODEL. With 'defer to override' only its config.json is read and the weights come from Apply "
                        "Transformer Override.",
            search_aliases=["diffusers folder", "modelopt", "fp8 loader", "load diffusion model", "sharded", "flux",
                            "fp8", "nvfp4", "quantized", "gguf", "gguf loader", "unet loader", "diffusion model", "awq",
                            "gptq", "int8", "bitsandbytes", "nf4", "compressed-tensors"],
            inputs=[
                inputs.checkpoints("base_model", "transformers",
                                   tooltip="What ComfyUI's model folders (diffusers, diffusion_models, checkpoints) "
                                           "hold of transformers, and the known repo ids."),
                io.Combo.Input("component", optional=True, options=["transformer", "transformer_2"],
                               default="transformer",
                               tooltip="Which transformer of a pipeline with two (Wan2.2: high and low noise)."),
                io.Combo.Input("weights", optional=True, options=["load", "defer to override"], default="load",
                               tooltip="defer to override: do not read, or even need, the base's weight files."),
                inputs.reference(),
                io.Combo.Input("dtype", options=["default", "bf16", "fp16", "fp32"], default="default", optional=True,
                               advanced=True, tooltip="Precision to compute in. default: what ComfyUI picks for the "
                                                      "device."),
                inputs.revision(),
                inputs.download_missing(),
                inputs.byte_order(),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, base_model: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, base_model, "transformers", reference)

    @classmethod
    def fingerprint_inputs(cls, base_model: str = "", reference: str = "", **kwargs) -> str:
        from . import checks

        return checks.fingerprint(base_model, reference, **kwargs)

    @classmethod
    def execute(cls, base_model: str = "", component: str = "transformer", weights: str = "load", reference: str = "",
                dtype: str = "default", revision: str = "", download_missing: bool = False,
                byte_order: str = "auto") -> io.NodeOutput:
        from ..loaders import model
        from . import checks

        request = model.Request(checks.chosen(reference, base_model), component, revision=revision, dtype=dtype,
                                download=download_missing, byte_order=byte_order)
        loaded = model.load(request) if weights == "load" else model.defer(request)
        return inputs.loaded(loaded.patcher, loaded.report)

"""Apply Transformer Override."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_ApplyTransformerOverride(io.ComfyNode):
    """Exchange a MODEL's transformer for a quantized one, keeping its patches and options."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ApplyTransformerOverride", display_name="Apply Transformer Override",
            category=inputs.CATEGORY,
            description="Replaces the transformer of a base MODEL by a quantized one (ModelOpt FP8 and NVFP4, fp8, "
                        "Nunchaku; folder, shards or file). LoRAs and options already on the MODEL are kept. The "
                        "incoming MODEL is not changed.",
            search_aliases=["modelopt", "fp8", "nunchaku", "quantized transformer", "transformer path", "override",
                            "nvfp4", "quantized", "gguf", "awq", "gptq", "int8", "bitsandbytes", "nf4",
                            "compressed-tensors"],
            inputs=[
                io.Model.Input("model", tooltip="The base, from Load Base Model or any loader of the same "
                                                "architecture."),
                inputs.checkpoints("override", "overrides",
                                   tooltip="What ComfyUI's model folders hold of transformers, those first that are "
                                           "called quantized, and the known repo ids."),
                io.Combo.Input("kind", optional=True, options=["auto", "component", "weights"], default="auto",
                               tooltip="component: config and weights of the override. weights: only its weights, the "
                                       "base's config stays. auto: component when there is a config.json."),
                inputs.reference(),
                io.String.Input("weights_name", optional=True, default="", advanced=True,
                                tooltip="File inside the folder or repo, where there are several."),
                inputs.compute(),
                io.Combo.Input("fp4_backend", optional=True, default="auto", advanced=True,
                               options=["auto", "comfy_kitchen", "flashinfer_cudnn", "flashinfer_cutlass",
                                        "flashinfer_trtllm"],
                               tooltip="Which kernels multiply NVFP4 layers. auto: comfy-kitchen, or what the "
                                       "environment variable SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND says. "
                                       "FlashInfer needs a Blackwell GPU; the report says what was taken."),
                inputs.revision(),
                inputs.download_missing(),
                inputs.byte_order(),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, override: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, override, "overrides", reference)

    @classmethod
    def fingerprint_inputs(cls, override: str = "", reference: str = "", model=None, **kwargs) -> str:
        from . import checks

        return checks.fingerprint(override, reference, **kwargs)

    @classmethod
    def execute(cls, model, override: str = "", kind: str = "auto", reference: str = "", weights_name: str = "",
                compute: str = "auto", fp4_backend: str = "auto", revision: str = "",
                download_missing: bool = False, byte_order: str = "auto") -> io.NodeOutput:
        from ..loaders import model as models
        from . import checks

        request = models.Request(checks.chosen(reference, override), weights_name=weights_name, revision=revision,
                                 compute=compute, fp4_backend=fp4_backend, download=download_missing,
                                 byte_order=byte_order)
        loaded = models.override(model, request, kind)
        return inputs.loaded(loaded.patcher, loaded.report)

"""ModelSlim Loader, Ascend MXFP8 Quantize: what Ascend's tools make."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_ModelSlimLoader(io.ComfyNode):
    """An export of msModelSlim (Ascend) as an ordinary MODEL, on any device."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ModelSlimLoader", display_name="ModelSlim Loader", category=inputs.CATEGORY,
            description="Loads a transformer that msModelSlim quantized for Ascend (W8A8, W8A8_DYNAMIC, MXFP8, MXFP4, "
                        "W4A4 and mixes of them), as exported or repacked for diffusers, as an ordinary MODEL. It runs "
                        "on Ascend NPUs, CUDA and the CPU.",
            search_aliases=["ascend", "npu", "msmodelslim", "w8a8", "mxfp8", "mxfp4", "wan2.2 w8a8", "int8", "w4a4",
                            "quantized"],
            inputs=[
                inputs.checkpoints("folder", "modelslim",
                                   tooltip="Folders with a quant_model_description*.json in ComfyUI's model folders, "
                                           "and known repo ids."),
                inputs.Listed("component", "experts", optional=True,
                              tooltip="Which of two experts: transformer is high_noise_model, transformer_2 is "
                                      "low_noise_model. A single model is transformer."),
                inputs.reference(),
                inputs.compute(),
                inputs.revision(),
                inputs.download_missing(),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, folder: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, folder, "modelslim", reference)

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", reference: str = "", **kwargs) -> str:
        from . import checks

        return checks.fingerprint(folder, reference, **kwargs)

    @classmethod
    def execute(cls, folder: str = "", component: str = "transformer", reference: str = "", compute: str = "auto",
                revision: str = "", download_missing: bool = False) -> io.NodeOutput:
        from ..loaders import model
        from . import checks

        loaded = model.load(model.Request(checks.chosen(reference, folder), component, revision=revision,
                                          compute=compute, download=download_missing, family="modelslim"))
        return inputs.loaded(loaded.patcher, loaded.report)


class QT_AscendMXFP8Quantize(io.ComfyNode):
    """A MODEL's Linear weights in MXFP8, quantized now."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_AscendMXFP8Quantize", display_name="Ascend MXFP8 Quantize", category=inputs.CATEGORY,
            description="Quantizes the Linear weights of any MODEL to MXFP8, by the rule of Ascend's kernels, layer by "
                        "layer. LoRAs and options already on the MODEL are kept. The incoming MODEL is not changed.",
            search_aliases=["mxfp8", "online quantization", "npu", "quantize model", "8 bit"],
            inputs=[
                io.Model.Input("model", tooltip="From any loader, in BF16, FP16 or FP32."),
                io.String.Input("keep_high_precision", optional=True, default="", multiline=True,
                                tooltip="Regular expressions, one a line, looked for in module names (diffusers' and "
                                        "ComfyUI's): these layers stay. Empty: the architecture's preset. To keep "
                                        "none: ^$"),
                io.Combo.Input("backend", optional=True, default="auto", advanced=True,
                               options=["auto", "torch_npu", "comfy_kitchen", "reference"],
                               tooltip="Who multiplies. auto: torch_npu on an Ascend that has MXFP8, else "
                                       "comfy_kitchen. reference: plain torch with the NPU's arithmetic, slow."),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")])

    @classmethod
    def execute(cls, model, keep_high_precision: str = "", backend: str = "auto") -> io.NodeOutput:
        from ..makers.online_mxfp8 import quantize

        patcher, report = quantize(model, keep_high_precision or "", backend)
        return inputs.loaded(patcher, report)

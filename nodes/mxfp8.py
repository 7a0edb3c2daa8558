"""Ascend MXFP8 Quantize."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


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

"""Nunchaku SVDQ Loader."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_NunchakuSVDQLoader(io.ComfyNode):
    """A Nunchaku SVDQuant file as an ordinary MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_NunchakuSVDQLoader", display_name="Nunchaku SVDQ Loader", category=inputs.CATEGORY,
            description="Loads Nunchaku's svdq-int4 and svdq-fp4 files (FLUX.1, FLUX.2 [klein], Qwen-Image, Z-Image, "
                        "SDXL) as an ordinary MODEL. No nunchaku wheel is needed; LoRAs go through ComfyUI's own "
                        "nodes.",
            search_aliases=["nunchaku", "svdquant", "svdq", "int4", "nvfp4", "fp4", "4-bit", "awq", "lightning",
                            "quantized"],
            inputs=[
                inputs.checkpoints("weights", "nunchaku",
                                   tooltip="What ComfyUI's model folders hold, and the known repo ids: a svdq-* file, "
                                           "or a folder of the older kind with two files. Last of the local ones are "
                                           "those whose names do not tell."),
                inputs.Listed("precision", "precisions", optional=True,
                               tooltip="Which file to take where there are several, and what the file must hold. auto: "
                                       "nvfp4 on Blackwell GPUs, int4 elsewhere. The tensors decide what it is."),
                io.Int.Input("rank", optional=True, default=0, min=0, max=1024,
                             tooltip="Rank of the low-rank parts, to choose among several files. 0: auto (32 where "
                                     "there is one)."),
                inputs.reference(),
                io.String.Input("weights_name", optional=True, default="", advanced=True,
                                tooltip="File inside the folder or repo, where there are several."),
                io.Combo.Input("backend", options=["auto", "comfy_kitchen", "nunchaku", "dequantize"], default="auto",
                               optional=True, advanced=True,
                               tooltip="What multiplies the 4-bit layers. auto: the best for this GPU; the report says "
                                       "which and why. comfy_kitchen: ComfyUI's own kernels. nunchaku: the nunchaku "
                                       "wheel, if it is installed. dequantize: any device, 4-bit in memory."),
                inputs.revision(),
                inputs.download_missing(),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    async def validate_inputs(cls, weights: str = "", reference: str = "") -> bool | str:
        from . import checks

        return await checks.ready(cls, weights, "nunchaku", reference)

    @classmethod
    def fingerprint_inputs(cls, weights: str = "", reference: str = "", **kwargs) -> str:
        from . import checks

        return checks.fingerprint(weights, reference, **kwargs)

    @classmethod
    def execute(cls, weights: str = "", precision: str = "auto", rank: int = 0, reference: str = "",
                weights_name: str = "", backend: str = "auto", revision: str = "",
                download_missing: bool = False) -> io.NodeOutput:
        from ..loaders import model
        from ..loaders.families.nunchaku.files import Choice
        from . import checks

        request = model.Request(checks.chosen(reference, weights), weights_name=weights_name, revision=revision,
                                download=download_missing, family="nunchaku", choices=Choice(precision, rank),
                                backend=backend)
        loaded = model.load(request)
        return inputs.loaded(loaded.patcher, loaded.report)

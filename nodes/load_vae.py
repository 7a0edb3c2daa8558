"""Load Base VAE."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


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
    def validate_inputs(cls, base_model: str = "", reference: str = "") -> bool | str:
        from . import checks

        return checks.ready(cls, base_model, "VAEs", reference)

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

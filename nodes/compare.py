"""Compare Models."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .. import host
from . import inputs

# Asked here, too: a ComfyUI without them costs this node, where a schema that raises costs all of the pack.
host.sampler_names(), host.scheduler_names()


class QT_CompareModels(io.ComfyNode):
    """What two versions of one model draw from the same noise, and how far they are apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_CompareModels", display_name="Compare Models", category=inputs.CATEGORY, is_output_node=True,
            description="Samples two MODELs from the same noise and conditioning and says how far they drift apart at "
                        "every step and in the result: what quantization costs, on your own prompt.",
            search_aliases=["quality loss", "psnr", "ssim", "lpips", "quantization error", "difference", "benchmark"],
            inputs=[
                io.Model.Input("reference_model", tooltip="The model to measure against, for instance in BF16."),
                io.Model.Input("model", tooltip="Another version of the same model, for instance quantized."),
                io.Conditioning.Input("positive", tooltip="As for KSampler; both models get it."),
                io.Conditioning.Input("negative", tooltip="As for KSampler; both models get it."),
                io.Latent.Input("latent_image", tooltip="Pictures or video, empty or not; sets the size."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Of the noise that both models start from."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps, the same for both."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance, the same for both."),
                io.Combo.Input("sampler_name", options=host.sampler_names(), default="euler",
                               tooltip="One without random steps shows the model's difference alone."),
                io.Combo.Input("scheduler", options=host.scheduler_names(), default="simple",
                               tooltip="How the noise levels are spread, the same for both."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="As for KSampler: below 1 the latent is partly kept."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes both results: then pictures are measured and shown side by side."),
            ],
            outputs=[io.String.Output("report", display_name="report"),
                     io.Image.Output("plot", display_name="plot",
                                     tooltip="Curves over the steps; with a VAE the pair and its difference above.")])

    @classmethod
    def execute(cls, reference_model, model, positive, negative, latent_image, seed: int, steps: int, cfg: float,
                sampler_name: str, scheduler: str, denoise: float = 1.0, vae=None) -> io.NodeOutput:
        from ..host.texts import said
        from ..makers.compare.models import compare_models

        report, picture = compare_models(
            reference_model, model, latent_image, seed=seed, vae=vae, positive=positive, negative=negative, steps=steps,
            cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        report = said(report)
        shown = {**ui.PreviewText(report).as_dict(), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(report, picture, ui=shown)

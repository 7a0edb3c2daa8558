"""The host's samplers and VAE decoding, as its own sampler and decode nodes call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .check import needs
from .texts import Text

if TYPE_CHECKING:
    import torch


@needs("comparing")
def start_of(patcher: Any, latent: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent, noise) that sampling of a LATENT begins with: an empty one with the channels of the MODEL's latents, and
    the noise of `seed`. F32 [B, C, H, W] or [B, C, T, H, W]; raises TypeError for latents in several parts."""
    import comfy.sample

    samples = latent["samples"]
    if samples.is_nested:
        raise TypeError(Text("a latent in several parts (video with sound)"))
    samples = comfy.sample.fix_empty_latent_channels(patcher, samples, latent.get("downscale_ratio_spacial"),
                                                     latent.get("downscale_ratio_temporal"))
    return samples, comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))


@needs("comparing")
def sample(patcher: Any, start: tuple[torch.Tensor, torch.Tensor], on_step: Callable[[int, torch.Tensor], None], *,
           mask: Any = None, steps: int, quiet: bool = False, **options: Any) -> torch.Tensor:
    """Sample from (latent, noise); the result on the CPU.

    `on_step` gets the number of the step, from 0, and the denoised prediction x0 of the sampler's callback. Previews,
    progress and Cancel are those of the host's nodes; with `quiet` there are none, for they take time of the next step.
    `options`: those of comfy.sample.sample.
    """
    import comfy.sample
    import comfy.utils
    import latent_preview

    shown = None if quiet else latent_preview.prepare_callback(patcher, steps)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        on_step(step, x0)
        if shown:
            shown(step, x0, x, total)

    latent, noise = start
    result = comfy.sample.sample(patcher, noise, steps=steps, latent_image=latent, noise_mask=mask, callback=callback,
                                 disable_pbar=quiet or not comfy.utils.PROGRESS_BAR_ENABLED, **options)
    return result.to("cpu")


@needs("keeping decoded weights")
def around_sampling(patcher: Any, key: str, begin: Callable[[Any], Any]) -> None:
    """Whenever this patcher or a clone of it samples, `begin(the one that does)` makes a run: `run.step(call)` is
    called instead of every `call()` that evaluates the model, and `run.end()` at last, whatever happens."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    def sampled(sample: Any, *args: Any, **kwargs: Any) -> Any:
        guider = sample.class_obj
        run = begin(guider.model_patcher)

        def step(evaluate: Any, *args: Any, **kwargs: Any) -> Any:
            return run.step(lambda: evaluate(*args, **kwargs))

        # into options that are of this sampling alone
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, step, guider.model_options, is_model_options=True)
        try:
            return sample(*args, **kwargs)
        finally:
            run.end()

    patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, sampled)


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [N, H, W, C] in 0..1 of a latent; the frames of a video one after the other."""
    import torch

    with torch.no_grad():  # as the server runs nodes
        pictures = vae.decode(latents)
    return (pictures.reshape(-1, *pictures.shape[-3:]) if pictures.ndim == 5 else pictures).float().to("cpu")

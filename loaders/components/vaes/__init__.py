"""The registry of VAE classes. A new one is one file with a `VAEClass` and one line here."""

from __future__ import annotations

from .autoencoder_kl import AUTOENCODER_KL
from .base import Latents, Plan, VAEClass
from .cogvideox import COGVIDEOX
from .cosmos import COSMOS
from .flux2 import FLUX2
from .hunyuan_15 import HUNYUAN_IMAGE_REFINER, HUNYUAN_VIDEO_15
from .hunyuan_image import HUNYUAN_IMAGE
from .hunyuan_video import HUNYUAN_VIDEO
from .ltx import LTX2_VIDEO, LTX_VIDEO
from .ltx2_audio import LTX2_AUDIO
from .mochi import MOCHI
from .qwen_image import QWEN_IMAGE
from .wan import WAN

VAES: tuple[VAEClass, ...] = (
    AUTOENCODER_KL, COGVIDEOX, COSMOS, FLUX2, HUNYUAN_IMAGE, HUNYUAN_IMAGE_REFINER, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15,
    LTX_VIDEO, LTX2_VIDEO, LTX2_AUDIO, MOCHI, QWEN_IMAGE, WAN)

__all__ = ["VAES", "Latents", "Plan", "VAEClass", "by_class_name"]


def by_class_name(class_name: object) -> VAEClass | None:
    """The class of a config.json's `_class_name`, or None."""
    return next((vae for vae in VAES if vae.class_name == class_name), None)

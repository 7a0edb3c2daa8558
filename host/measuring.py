"""What a measurement asks of the host: the shape of a model's latents, how much is on the device, and to let go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .check import needs
from .texts import Text

if TYPE_CHECKING:
    import torch


@needs("measuring")
def empty_latent(patcher: Any, width: int, height: int, frames: int) -> dict[str, torch.Tensor]:
    """An empty LATENT for a picture or video of so many pixels and frames: F32 zeros [1, C, H, W] or [1, C, T, H, W].

    Raises ValueError for several frames of a model whose latents are those of one picture.
    """
    import torch

    latents = patcher.get_model_object("latent_format")
    sides = [side // latents.spacial_downscale_ratio for side in (height, width)]
    if latents.latent_dimensions == 3:
        sides.insert(0, (frames - 1) // latents.temporal_downscale_ratio + 1)
    elif frames != 1:
        raise ValueError(Text("this model makes pictures, not videos"))
    return {"samples": torch.zeros(1, latents.latent_channels, *sides)}


@needs("measuring")
def weight_bytes(patcher: Any) -> tuple[int, int]:
    """(bytes of a MODEL's weights that are on the device now, all bytes of its weights), by the host's own count."""
    return int(patcher.loaded_size()), int(patcher.model_size())


@needs("measuring")
def let_go() -> None:
    """Take all models off the device, and give the memory that torch keeps for later back."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()

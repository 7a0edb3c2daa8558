"""Small Z-Image models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support import common

# ComfyUI wants heads of 128, at least 1024 channels, a multiple of 96, and two of each refiner; so this
# is as small as Z-Image gets: 84M parameters.
HEADS, DIM, TEXT, REAL_DIM = 9, 1152, 64, 3840


@contextmanager
def small_widths() -> Iterator[None]:
    """Let the host build narrow models: it knows Z-Image by its width of 3840 only.

    A model of the real width is left to the host.
    """
    import comfy.model_detection
    import comfy.supported_models

    detect, wanted = comfy.model_detection.detect_unet_config, comfy.supported_models.ZImage.unet_config

    def detect_widths(tensors: dict, prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        config = detect(tensors, prefix, *args, **kwargs)
        if config and config.get("image_model") == "lumina2" and config["dim"] == DIM:
            # as comfy/model_detection.py has it for 3840, and the head count of this width
            config |= {"n_heads": HEADS, "n_kv_heads": HEADS, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
                       "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True,
                       "time_scale": 1000.0, "pad_tokens_multiple": 32}
            omni = tensors.get(f"{prefix}siglip_embedder.0.weight")
            config |= {} if omni is None else {"siglip_feat_dim": omni.shape[0]}
            comfy.supported_models.ZImage.unet_config = {**wanted, "dim": DIM}
        return config

    comfy.model_detection.detect_unet_config = detect_widths
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect
        comfy.supported_models.ZImage.unet_config = wanted


def make(layers: int = 1, seed: int = 0, siglip: int | None = None) -> Any:
    """A seeded diffusers ZImageTransformer2DModel in BF16; every norm, bias and pad token randomised too."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    model = common.randomise(ZImageTransformer2DModel(dim=DIM, n_layers=layers, n_heads=HEADS, n_kv_heads=HEADS,
                                                      cap_feat_dim=TEXT, siglip_feat_dim=siglip))
    omni = siglip is not None
    with torch.no_grad():
        for embedder in (model.cap_embedder, model.siglip_embedder) if omni else (model.cap_embedder,):
            embedder[0].weight += 1  # a norm by another name
        for pad in (model.x_pad_token, model.cap_pad_token, *([model.siglip_pad_token] if omni else [])):
            pad.normal_()  # one row, of unit size as the tokens it stands beside
    return model


def inputs(batch: int = 2, height: int = 8, width: int = 12, text: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents [B, 16, H, W], sigma .5 and .25, text [B, T, 64]; F32. Both sides pad tokens and text to 32."""
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 16, height, width, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "text": torch.randn(batch, text, TEXT, generator=g)}


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """diffusers' own forward in the model's dtype; time runs the other way and the sign is turned, as ZImagePipeline
    does both."""
    with torch.no_grad():
        out = model(list(x[:, :, None].to(model.dtype)), 1 - sigma, list(text.to(model.dtype)), return_dict=False)[0]
    return -torch.stack(out)[:, :, 0]


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                   load: bool = True) -> torch.Tensor:
    """The same through the host."""
    return common.apply_model(patcher, x, sigma, load, c_crossattn=text, num_tokens=text.shape[1])


def export(model: Any, folder: Path, algorithm: str = "FP8", **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model."""
    return common.export(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(seed=seed)), algorithm, **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False) -> Any:
    """diffusers' Z-Image on the stored weights, FP8 activations emulated (common.emulate)."""
    from diffusers import ZImageTransformer2DModel

    return common.emulate(ZImageTransformer2DModel, tensors, config, dynamic)

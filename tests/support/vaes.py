"""Tiny VAEs made and run by diffusers, as the `vae` folder of a base."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

# ComfyUI's group norms have 32 groups, so 32 channels are the narrowest; every level has another width, so that a tensor
# in the wrong place cannot fit.
KL = {"block_out_channels": (32, 64, 96, 128), "layers_per_block": 2, "sample_size": 64}
LEVELS_2D = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FLUX1 = {**KL, **LEVELS_2D, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
         "use_post_quant_conv": False}
# The values published in Wan2.2-TI2V-5B-Diffusers/vae/config.json; diffusers' class has Wan 2.1's as its default.
WAN22_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
    0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
    -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
WAN22_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454,
    0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444,
    0.4089, 0.7468, 0.7744]
WAN22 = {"z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
         "scale_factor_spatial": 16, "latents_mean": WAN22_MEAN, "latents_std": WAN22_STD}
# LTX-Video 0.9.0, 0.9.1, 0.9.5 (0.9.8 has its sizes), LTX-2: the published sizes, and tiny ones of the same kinds.
LTX = {"encoder_causal": True, "decoder_causal": False}
LTX_091 = {**LTX, "decoder_inject_noise": (True, True, True, False), "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3,
           "decoder_spatio_temporal_scaling": (True,) * 3, "timestep_conditioning": True}
LTX_095 = {**LTX_091, "decoder_inject_noise": (False,) * 4, "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
           "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
           "spatio_temporal_scaling": (True,) * 4, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
_THREE = {"decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 2, 1)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("AutoencoderKL", {**FLUX1, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "ltx": ("AutoencoderKLLTXVideo", {
        **LTX, "block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 2), "decoder_layers_per_block": (1, 1, 1, 1, 2)}),
    "ltx091": ("AutoencoderKLLTXVideo", {**LTX_091, **_THREE, "block_out_channels": (8, 16, 32, 32),
                                         "layers_per_block": (1, 1, 1, 1, 2)}),
    "ltx095": ("AutoencoderKLLTXVideo", {**LTX_095, **_THREE, "block_out_channels": (8, 16, 32, 64, 128),
                                         "layers_per_block": (1, 1, 1, 1, 2)}),
    "ltx2": ("AutoencoderKLLTX2Video", {**_THREE, "decoder_causal": False, "block_out_channels": (256, 256, 512, 512),
                                        "layers_per_block": (1, 1, 1, 1, 1)}),
    "flux1": ("AutoencoderKL", FLUX1),
    "z_image": ("AutoencoderKL", FLUX1),
    "sdxl": ("AutoencoderKL", {**KL, **LEVELS_2D, "latent_channels": 4, "scaling_factor": 0.13025}),
    "sd15": ("AutoencoderKL", {**KL, **LEVELS_2D, "latent_channels": 4}),  # published without scaling_factor
    "flux2": ("AutoencoderKLFlux2", {**KL, **LEVELS_2D, "decoder_block_out_channels": (64, 64, 128, 192)}),
    "wan": ("AutoencoderKLWan", {"base_dim": 12}),
    "wan22": ("AutoencoderKLWan", {**WAN22, "base_dim": 12, "decoder_base_dim": 20}),
    "hunyuan_image": ("AutoencoderKLHunyuanImage", {
        "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (32, 32, 64, 64, 128, 128),
        "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289}),
    "hunyuan_refiner": ("AutoencoderKLHunyuanImageRefiner", {"block_out_channels": (16, 16, 32, 64, 64)}),
    "hunyuan_video_15": ("AutoencoderKLHunyuanVideo15", {"block_out_channels": (16, 16, 32, 64, 64)}),
    "cogvideox": ("AutoencoderKLCogVideoX", {"block_out_channels": (32, 32, 64, 64), "scaling_factor": 0.7}),
    "cosmos": ("AutoencoderKLCosmos", {"encoder_block_out_channels": (8, 16, 32, 32), "decode_block_out_channels": (16, 32, 32, 32)}),
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", {k: v for k, v in KL.items() if k != "sample_size"}),
    "qwen_image": ("AutoencoderKLQwenImage", {"base_dim": 12}),
    "mochi": ("AutoencoderKLMochi", {"encoder_block_out_channels": (32, 64, 96, 128), "decoder_block_out_channels": (64, 32, 96, 128)}),
}
# The published sizes, for checks that need no memory.
PUBLISHED: dict[str, dict[str, Any]] = {
    "flux1": {"block_out_channels": (128, 256, 512, 512)}, "z_image": {"block_out_channels": (128, 256, 512, 512)},
    "sdxl": {"block_out_channels": (128, 256, 512, 512)}, "sd15": {"block_out_channels": (128, 256, 512, 512)},
    "flux2": {"block_out_channels": (128, 256, 512, 512), "decoder_block_out_channels": None},
    "wan": {"base_dim": 96}, "wan22": {"base_dim": 160, "decoder_base_dim": 256},
    "hunyuan_video": {"block_out_channels": (128, 256, 512, 512)}, "qwen_image": {"base_dim": 96},
    "hunyuan_image": {"block_out_channels": (128, 256, 512, 512, 1024, 1024)},
    **dict.fromkeys(("hunyuan_refiner", "hunyuan_video_15"), {"block_out_channels": (128, 256, 512, 1024, 1024)}),
    "cogvideox": {"block_out_channels": (128, 256, 256, 512)},
    "cosmos": {"encoder_block_out_channels": (128, 256, 512, 512), "decode_block_out_channels": (256, 512, 512, 512)},
    "sd3": {"block_out_channels": (128, 256, 512, 512)},
    "mochi": {"encoder_block_out_channels": (64, 128, 256, 384), "decoder_block_out_channels": (128, 256, 512, 768)},
    "ltx": {**dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), (128, 256, 512, 512)),
            **dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (4, 3, 3, 3, 4))},
    "ltx091": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": (4, 3, 3, 3, 4),
               "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 6, 7, 8)},
    "ltx095": {"block_out_channels": (128, 256, 512, 1024, 2048), "layers_per_block": (4, 6, 6, 2, 2),
               "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 5, 5, 5)},
    "ltx2": {"block_out_channels": (256, 512, 1024, 2048), "layers_per_block": (4, 6, 6, 2, 2),
             "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 5, 5, 5)}}
NOISE_SEED = 5
IMAGES = ("flux1", "z_image", "sdxl", "sd15", "flux2", "sd3", "hunyuan_image")
LTX_NOISE, LTX_TIME = 0.025, 0.05  # ComfyUI's, which diffusers' pipelines are told


def empty(family: str, **config: Any) -> Any:
    """A diffusers VAE as its constructor leaves it."""
    import diffusers

    class_name, defaults = FAMILIES[family]
    kind, sizes = getattr(diffusers, class_name), {**defaults, **config}
    own = "decoder_block_out_channels"
    if own not in sizes or own in inspect.signature(kind.__init__).parameters:
        return kind(**sizes)
    decoder = sizes.pop(own)  # diffusers before 0.38: its decoder of these widths, put in by hand
    model = kind(**sizes)
    if decoder:
        model.decoder = kind(**{**sizes, "block_out_channels": decoder}).decoder
    model.register_to_config(**{own: decoder})
    return model


def make(family: str, seed: int = 7, **config: Any) -> Any:
    """A diffusers VAE in F32 with seeded random weights of a size that keeps pictures within -1..1, most of the time."""
    torch.manual_seed(seed)
    model = empty(family, **config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 0:
                continue  # by which LTX-Video's decoder counts time
            if p.ndim == 1 or name.endswith("gamma"):
                p.copy_(torch.randn(p.shape) * 0.1 + (1.0 if "norm" in name and not name.endswith("bias") else 0.0))
            else:
                p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
        for name, p in model.named_parameters():  # the picture and the latent stay small
            if name.startswith(("decoder.conv_out", "encoder.conv_out")):
                p.mul_(0.15 if family in ("ltx091", "cogvideox", "cosmos") else 0.3)  # noise, or the latent, makes some pixels far larger
            if family == "mochi" and name.startswith("decoder.proj_out"):  # what comes out of 19 blocks, without a norm
                p.mul_(0.04)
        if family == "flux2":  # a trained batch norm, not the identity of a new one
            model.bn.running_mean.copy_(torch.randn_like(model.bn.running_mean) * 0.3)
            model.bn.running_var.copy_(torch.rand_like(model.bn.running_var) + 0.5)
        if normalises(model):  # trained statistics
            model.latents_mean.copy_(torch.randn_like(model.latents_mean) * 0.3)
            model.latents_std.copy_(torch.rand_like(model.latents_std) + 0.5)
    for switch in ("use_framewise_encoding", "use_framewise_decoding"):  # tiles in time, blended: another function
        if hasattr(model, switch):
            setattr(model, switch, False)
    return model.eval().requires_grad_(False)


def save(family: str, folder: Path, model: Any = None, **options: Any) -> dict[str, list[str]]:
    """Write `vae/` into a base's folder (save_pretrained takes `options`) and return its entry for model_index.json."""
    (model or make(family)).save_pretrained(folder / "vae", **options)
    return {"vae": ["diffusers", FAMILIES[family][0]]}


def save_base(family: str, folder: Path, model: Any = None, **options: Any) -> Path:
    """A base that holds nothing but its VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "DiffusionPipeline", **save(family, folder, model, **options)}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def diffusers_decode(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Pixels 0..1, channels last, from the sampler's latent as ComfyUI has it, by the pipelines' own formulas.

    pipeline_flux.py and pipeline_z_image.py, pipeline_stable_diffusion_xl.py, pipeline_flux2.py, pipeline_wan.py,
    pipeline_qwenimage.py and pipeline_hunyuan_video.py of diffusers; the latent is F32 [B, C, H, W] or [B, C, T, H, W].
    """
    with torch.inference_mode():
        if model.config.get("timestep_conditioning"):  # pipeline_ltx.py, with the noise that ComfyUI draws
            torch.manual_seed(NOISE_SEED)
            latent = (1 - LTX_NOISE) * latent + LTX_NOISE * torch.randn_like(latent)
            time = torch.tensor([LTX_TIME])
            pixels = model.decode(raw_latent(model, latent), time, return_dict=False)[0]
        else:
            torch.manual_seed(NOISE_SEED)
            drop_in_blocks(model)
            pixels = model.decode(raw_latent(model, latent), return_dict=False)[0]
    return (pixels.clamp(-1, 1) / 2 + 0.5).movedim(1, -1)


def drop_in_blocks(model: Any, done: bool = True) -> None:
    """Let Mochi's decoder drop in every block the frames that come too many, as Genmo's and ComfyUI's do (DepthToSpaceTime
    in comfy/ldm/genmo/vae/model.py); diffusers' drops them all at the end, or again with `done` False."""
    if type(model).__name__ != "AutoencoderKLMochi":
        return
    model.drop_last_temporal_frames = not done
    for block in model.decoder.up_blocks:
        block._forward_hooks.clear()
        if done:
            block.register_forward_hook(lambda block, _, out: (out[0][:, :, block.temporal_expansion - 1:], out[1]))


def cosmos_statistics(model: Any, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel and frame, as pipeline_cosmos_text2world.py takes them."""
    mean, std = (torch.tensor(model.config[key]).view(1, 16, -1, 1, 1)[:, :, :frames] for key in ("latents_mean", "latents_std"))
    return mean, std


COSMOS_SIGMA = 0.5  # of its scheduler


def normalises(model: Any) -> bool:
    """Whether statistics of the latents are among a model's tensors, as ComfyUI has them."""
    return "latents_std" in dict(model.named_buffers())


def raw_latent(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """What the pipelines hand to the VAE for a sampler's latent."""
    config = model.config
    if hasattr(model, "bn"):
        from diffusers import Flux2Pipeline

        std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return Flux2Pipeline._unpatchify_latents(latent * std + model.bn.running_mean.view(1, -1, 1, 1))
    if type(model).__name__ == "AutoencoderKLCosmos":
        mean, std = cosmos_statistics(model, latent.shape[2])
        return latent * std / COSMOS_SIGMA + mean
    if normalises(model):
        mean, std = (one.view(1, -1, 1, 1, 1) for one in (model.latents_mean, model.latents_std))
        return latent * std / config.scaling_factor + mean
    if config.get("latents_mean"):
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return latent / (1.0 / std) + mean
    latent = latent / config.scaling_factor + (config.get("shift_factor") or 0.0)
    if type(model).__name__.endswith("Refiner"):
        from diffusers import HunyuanImageRefinerPipeline

        return HunyuanImageRefinerPipeline._restore_image_tokens_order(latent)
    return latent


def diffusers_encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The mean of the distribution for pixels 0..1 [B, H, W, C] or [B, T, H, W, C]; FLUX.2's patched and normalised."""
    with torch.inference_mode():
        posterior = model.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist
        mean = posterior.sample() if type(model).__name__ == "AutoencoderKLCosmos" else posterior.mode()  # an identity
        if type(model).__name__ == "AutoencoderKLCosmos":
            middle, std = cosmos_statistics(model, mean.shape[2])
            return (mean - middle) * COSMOS_SIGMA / std
        if normalises(model):  # ComfyUI's normalises by itself
            return (mean - model.latents_mean.view(1, -1, 1, 1, 1)) / model.latents_std.view(1, -1, 1, 1, 1)
        if not hasattr(model, "bn"):
            return mean
        from diffusers import Flux2Pipeline

        std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
        return (Flux2Pipeline._patchify_latents(mean) - model.bn.running_mean.view(1, -1, 1, 1)) / std

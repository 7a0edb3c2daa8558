"""Tiny SDXL UNets by diffusers, packed as Nunchaku publishes SDXL, and run by both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from support import common
from support import svdquant_models as models
from support import svdquant_tables as tables

# One block on the second level, two on the third and in the middle; the third level's width is 4 * 64.
SMALL = {"hidden": 64, "in": 4, "out": 4, "text": 96, "vector": 32 + 6 * 256, "middle": 1, "deep": 2}
PUBLISHED = {"hidden": 320, "in": 4, "out": 4, "text": 2048, "vector": 2816, "middle": 2, "deep": 10}
SIZE = {"height": 640, "width": 1152, "crop_h": 16, "crop_w": 48, "target_height": 512, "target_width": 896}


@contextmanager
def small_widths(sizes: dict[str, int] = SMALL) -> Iterator[None]:
    """Let the host and the pack take these sizes for SDXL: both know it by its published sizes alone."""
    import comfy.supported_models

    from quantized_transformers.loaders.architectures import sdxl

    theirs, ours = comfy.supported_models.SDXL.unet_config, dict(sdxl.SIZES)
    comfy.supported_models.SDXL.unet_config = {
        **theirs, "model_channels": sizes["hidden"], "context_dim": sizes["text"], "adm_in_channels": sizes["vector"],
        "transformer_depth": [0, 0, *[sizes["middle"]] * 2, *[sizes["deep"]] * 2]}
    sdxl.SIZES.update(sizes)
    try:
        yield
    finally:
        comfy.supported_models.SDXL.unet_config = theirs
        sdxl.SIZES.update(ours)


def network(sizes: dict[str, int], **config: Any) -> Any:
    """A diffusers UNet2DConditionModel built as SDXL's config.json builds it."""
    from diffusers import UNet2DConditionModel

    widths = [n * sizes["hidden"] for n in (1, 2, 4)]
    return UNet2DConditionModel(**{
        "sample_size": 128, "in_channels": sizes["in"], "out_channels": sizes["out"], "layers_per_block": 2,
        "block_out_channels": widths, "attention_head_dim": [width // 64 for width in widths],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, sizes["middle"], sizes["deep"]], "cross_attention_dim": sizes["text"],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": sizes["vector"], **config})


def table(unet: Any) -> tables.Table:
    """What Nunchaku quantizes of a UNet: six layers of every transformer block."""
    rows: tables.Table = {}
    for name, module in unet.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            rows[f"{name}.attn1.to_qkv"] = ([f"{name}.attn1.to_{x}" for x in "qkv"], "")
            rows |= {f"{name}.{layer}": ([f"{name}.{layer}"], "") for layer in (
                "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")}
    return rows


def make(precision: str = "int4", rank: int = 16, sizes: dict[str, int] = SMALL) -> models.Made:
    """SDXL with legacy suffixes, as published."""
    torch.manual_seed(0)
    unet = common.randomise(network(sizes))
    return models._make(unet, table(unet), precision, rank, models.file_name(precision, rank, "sdxl"),
                        "NunchakuSDXLUNet2DConditionModel", legacy=True)


def published_shapes() -> tuple[dict[str, tuple[int, ...]], tables.Table]:
    """Names and shapes of SDXL's tensors, and what is quantized of them."""
    with torch.device("meta"):
        unet = network(PUBLISHED)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}, table(unet)


def inputs(seed: int = 1) -> dict[str, Any]:
    """Latents [2, 4, 8, 12], two timesteps, text [2, 7, text] and pooled text [2, 32]; F32."""
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 4, 8, 12, generator=g), "steps": torch.tensor([999, 400]),
            "text": torch.randn(2, 7, SMALL["text"], generator=g), "pooled": torch.randn(2, 32, generator=g)}


def _sigma(steps: torch.Tensor) -> torch.Tensor:
    """The noise levels of SDXL's schedule, by diffusers' own scheduler for it."""
    from diffusers import EulerDiscreteScheduler

    alphas = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    return ((1 - alphas[steps]) / alphas[steps]) ** 0.5


def diffusers_eps(unet: Any, x: torch.Tensor, steps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
                  ) -> torch.Tensor:
    """The noise that diffusers' UNet predicts; x has the noise of those timesteps, as in StableDiffusionXLPipeline."""
    ids = [SIZE[key] for key in ("height", "width", "crop_h", "crop_w", "target_height", "target_width")]
    scaled = x / (_sigma(steps).view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
    added = {"text_embeds": pooled, "time_ids": torch.tensor([ids] * len(x), dtype=torch.float32)}
    with torch.no_grad():
        return unet(scaled, steps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def comfy_eps(patcher: Any, x: torch.Tensor, steps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor,
              load: bool = True) -> torch.Tensor:
    """The same through the host: its schedule, its class labels, its prediction type."""
    y = patcher.model.encode_adm(pooled_output=pooled, **SIZE)
    return common.apply_model(patcher, x, _sigma(steps), load, c_crossattn=text, y=y)

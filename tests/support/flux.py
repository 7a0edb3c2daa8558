"""Tiny FLUX.1 models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support.common import (  # noqa: F401  # one name for all that FLUX.1 tests use
    apply_model,
    config_of,
    dequantize,
    export,
    randomise,
    rel_l2,
    save,
    stored,
)
from support.common import emulate as emulate_class

# What ComfyUI fixes cannot shrink: heads of 128, 16 latent channels, MLP ratio 4.
HEAD, TEXT, POOLED, CHANNELS = 128, 64, 32, 64
FALLBACK = [r"transformer_blocks\.\d+\.norm1(_context)?\.linear", r"transformer_blocks\.\d+\.ff(_context)?\.net\..*",
            r"single_transformer_blocks\.\d+\.norm\.linear", r"x_embedder|context_embedder|proj_out|norm_out.*"]


def make(heads: int = 2, double: int = 2, single: int = 2, guidance: bool = True, seed: int = 0,
         channels: int = CHANNELS) -> Any:
    """A seeded diffusers FluxTransformer2DModel in BF16, every norm and bias randomised too; `channels` of a token."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=CHANNELS, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
        num_attention_heads=heads, joint_attention_dim=TEXT, pooled_projection_dim=POOLED, guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56))
    return randomise(model)


def same_at_real_size(kind: Any, architecture: Any, options: dict[str, Any], host_class: str, folder: Path) -> None:
    """Diffusers' class with these options, the host's model of its config and our table have the same names and shapes."""
    from quantized_transformers.loaders import model
    from quantized_transformers.loaders.architectures.base import Naming

    with torch.device("meta"):
        published = kind(**options)
    config = {"_class_name": kind.__name__, **options}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    patcher = model.defer(model.Request(str(folder))).patcher
    dims = architecture.dims_from_config(config)
    assert model.base_of(patcher) == (architecture.name, dims)
    assert type(patcher.model.model_config).__name__ == host_class
    ours: dict[str, dict[str, tuple[int, ...]]] = {"host": {}, "diffusers": {}}
    for module in architecture.modules(dims, Naming("diffusers")):
        leaf = module.leaf.replace("scale", "weight")  # which the host renames
        for name, rows in zip(module.stored, module.rows, strict=True):
            ours["diffusers"][f"{name}.{module.stored_leaf}"] = (rows, *module.inner)
            ours["diffusers"] |= {f"{name}.bias": (rows,)} if module.bias else {}
        ours["host"][f"{module.native}.{leaf}"] = (sum(module.rows), *module.inner)
        ours["host"] |= {f"{module.native}.bias": (sum(module.rows),)} if module.bias else {}
    assert ours["diffusers"] == {name: tuple(p.shape) for name, p in published.named_parameters()}
    assert ours["host"] == {name: tuple(p.shape) for name, p in patcher.model.diffusion_model.named_parameters()}


def inputs(batch: int = 2, height: int = 8, width: int = 10, text: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents [B, 16, H, W], sigma .5 and .25, guidance 4, text [B, T, 64], pooled [B, 32]; F32."""
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 16, height, width, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "guidance": torch.full((batch,), 4.0), "text": torch.randn(batch, text, TEXT, generator=g),
            "pooled": torch.randn(batch, POOLED, generator=g)}


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor,
                       pooled: torch.Tensor) -> torch.Tensor:
    """diffusers' own forward in the model's dtype, on latents packed 2x2 as FluxPipeline packs them."""
    b, c, h, w = x.shape
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    with torch.no_grad():
        out = model(hidden_states=tokens.to(model.dtype), timestep=sigma, img_ids=ids.view(-1, 3),
                    guidance=guidance if model.config.guidance_embeds else None,
                    pooled_projections=pooled.to(model.dtype),
                    encoder_hidden_states=text.to(model.dtype), txt_ids=torch.zeros(text.shape[1], 3),
                    return_dict=False)[0]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor,
                   pooled: torch.Tensor, load: bool = True) -> torch.Tensor:
    """The same through the host."""
    return apply_model(patcher, x, sigma, load, c_crossattn=text, y=pooled, guidance=guidance)


def export_fp8(model: Any, folder: Path, keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt FP8 export of a model."""
    return export(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(seed=seed)), "FP8", keep, **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False,
            weight_only: tuple[str, ...] = ()) -> Any:
    """diffusers' FLUX.1 on the stored weights, quantized activations emulated (common.emulate)."""
    from diffusers import FluxTransformer2DModel

    return emulate_class(FluxTransformer2DModel, tensors, config, dynamic, weight_only)


def export_nvfp4(model: Any, folder: Path, keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt NVFP4 export of a model. Calibration runs, though NVFP4's own forward needs CUDA."""
    return export(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(seed=seed)), "NVFP4", keep, **kwargs)


def agrees(patcher: Any, emulated: Any) -> bool:
    """Whether quantized activations in the host are those of an emulated diffusers model, over three inputs.

    A value within the last bit of a rounding step may fall to either side, and later layers amplify that one code: two
    right implementations agree to 1e-3 on most inputs and to a percent or two on the rest.
    """
    errors = sorted(rel_l2(comfy_velocity(patcher, **inputs(seed=seed)), diffusers_velocity(emulated, **inputs(seed=seed)))
                    for seed in (1, 2, 3))
    return errors[0] < 1e-3 and errors[-1] < 0.02

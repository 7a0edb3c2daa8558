"""Tiny FLUX.1 models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch

# What ComfyUI fixes cannot shrink (specs/parity.md section 1): heads of 128, 16 latent channels, MLP ratio 4.
HEAD, TEXT, POOLED, CHANNELS = 128, 64, 32, 64
FALLBACK = [r"transformer_blocks\.\d+\.norm1(_context)?\.linear", r"transformer_blocks\.\d+\.ff(_context)?\.net\..*",
            r"single_transformer_blocks\.\d+\.norm\.linear", r"x_embedder|context_embedder|proj_out|norm_out.*"]


def make(heads: int = 2, double: int = 2, single: int = 2, guidance: bool = True, seed: int = 0) -> Any:
    """A seeded diffusers FluxTransformer2DModel in BF16, every norm and bias randomised too."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=CHANNELS, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
        num_attention_heads=heads, joint_attention_dim=TEXT, pooled_projection_dim=POOLED, guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(torch.randn(p.shape) * p.shape[1] ** -0.5)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


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
    """The same through the host: load_models_gpu, apply_model, and denoised = x - velocity * sigma solved for it."""
    import comfy.model_management

    if load:
        comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        denoised = patcher.model.apply_model(x, sigma, c_crossattn=text, y=pooled, guidance=guidance,
                                             transformer_options=patcher.model_options["transformer_options"])
    return ((x - denoised) / sigma.view(-1, 1, 1, 1)).clone()


def rel_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, in F64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def export_fp8(model: Any, folder: Path, keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt FP8 export of a model (specs/modelopt.md 5.1); `keep` are regexes left in BF16.

    Returns the component folder. The model given is not changed.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = copy.deepcopy(model)

    def loop(m: Any) -> None:
        for seed in (3, 4):
            diffusers_velocity(m, **inputs(seed=seed))

    model = mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), loop)
    if keep:
        mtq.disable_quantizer(model, lambda name: any(re.match(k, name) for k in keep))
    export_hf_checkpoint(model, export_dir=str(folder), **kwargs)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component folder, by safetensors itself."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(str(file)))
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None, metadata: dict | None = None,
         name: str = "diffusion_pytorch_model.safetensors") -> Path:
    """Write a component folder from tensors and a config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / name), metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def dequantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored FP8 tensors → F32 by the definition fp8 x scale; scales dropped. Independent of the pack."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".input_scale")):
            continue
        scale = tensors.get(name.replace(".weight", ".weight_scale"))
        fp8 = tensor.dtype == torch.float8_e4m3fn and scale is not None
        out[name] = tensor.float() * scale.float() if fp8 and scale is not None else tensor.float()
    return out


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False) -> Any:
    """A diffusers model in F32 with the stored weights dequantized and FP8 activations emulated by hooks.

    Activation rule (specs/modelopt.md 2.3): clamp(x / input_scale, +-448) cast to E4M3, times input_scale; dynamic:
    input_scale = amax(x) / 448.
    """
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_config({k: v for k, v in config.items() if k != "quantization_config"})
    model.load_state_dict(dequantize(tensors), strict=True)

    def hook(scale: torch.Tensor | None):
        def quantize(_module: Any, args: tuple) -> tuple:
            x = args[0]
            s = x.abs().max() / 448 if scale is None else scale.float()
            return ((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s, *args[1:])
        return quantize

    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            scale = None if dynamic else tensors.get(f"{name}.input_scale")
            module.register_forward_pre_hook(hook(scale))
    return model.eval().requires_grad_(False)

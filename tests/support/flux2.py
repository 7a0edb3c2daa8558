"""Tiny FLUX.2 models: made by diffusers, exported by nvidia-modelopt, run by both diffusers and ComfyUI.

Here also is what FLUX.2 and HunyuanVideo tests share: the rows of native weights, told by diffusers' own converters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from support.common import apply_model, dequantize, quantized_fp8, randomise, rel_l2
from support.common import emulate as emulate_class
from support.common import export as export_model

# What ComfyUI fixes cannot shrink: heads of 128, 128 latent channels, MLP ratio 3.
HEAD, TEXT, CHANNELS = 128, 96, 128
# The layers that the published NVFP4 file quantizes are those of the blocks; the rest is BF16
# (docs/sources/modelopt.md, "FLUX.2-dev-NVFP4").
FALLBACK = [r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)", r".*stream_modulation.*",
            r"x_embedder|context_embedder|time_guidance_embed.*|proj_out|norm_out.*"]


def make(heads: int = 2, double: int = 2, single: int = 2, guidance: bool = True, seed: int = 0) -> Any:
    """A seeded diffusers Flux2Transformer2DModel in BF16, every norm randomised too. It has no biases."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(seed)
    return randomise(Flux2Transformer2DModel(
        in_channels=CHANNELS, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
        num_attention_heads=heads, joint_attention_dim=TEXT, guidance_embeds=guidance))


def inputs(batch: int = 2, height: int = 4, width: int = 5, text: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents [B, 128, H, W], sigma .5 and .25, guidance 4, text [B, T, 96]; F32."""
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, CHANNELS, height, width, generator=g), "sigma": torch.tensor([0.5, 0.25])[:batch],
            "guidance": torch.full((batch,), 4.0), "text": torch.randn(batch, text, TEXT, generator=g)}


def diffusers_velocity(model: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor,
                       text: torch.Tensor) -> torch.Tensor:
    """diffusers' own forward in the model's dtype; ids are (t, h, w, l) as Flux2Pipeline counts them."""
    b, c, h, w = x.shape
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w), torch.arange(1)).float()
    txt_ids = torch.zeros(text.shape[1], 4)
    txt_ids[:, 3] = torch.arange(text.shape[1])
    with torch.no_grad():
        out = model(hidden_states=x.flatten(2).transpose(1, 2).to(model.dtype), timestep=sigma, img_ids=ids,
                    guidance=guidance, encoder_hidden_states=text.to(model.dtype), txt_ids=txt_ids,
                    return_dict=False)[0]
    return out.transpose(1, 2).reshape(b, c, h, w)


def comfy_velocity(patcher: Any, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor,
                   load: bool = True) -> torch.Tensor:
    """The same through the host."""
    return apply_model(patcher, x, sigma, load, c_crossattn=text, guidance=guidance)


def export(model: Any, folder: Path, algorithm: str = "FP8", keep: list[str] | None = None, **kwargs: Any) -> Path:
    """The real nvidia-modelopt export of a model; `algorithm` is "FP8" or "NVFP4"."""
    return export_model(model, folder, lambda m, seed: diffusers_velocity(m, **inputs(seed=seed)), algorithm, keep,
                        **kwargs)


def emulate(tensors: dict[str, torch.Tensor], config: dict, dynamic: bool = False) -> Any:
    """diffusers' FLUX.2 on the stored weights, FP8 activations emulated (common.emulate)."""
    from diffusers import Flux2Transformer2DModel

    return emulate_class(Flux2Transformer2DModel, tensors, config, dynamic)


def convert(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own converter, unmodified: vendor names -> diffusers names."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    return convert_flux2_transformer_checkpoint_to_diffusers(dict(state_dict))


def host_shapes(patcher: Any) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of the model that ComfyUI built."""
    return {name: p.shape for name, p in patcher.model.diffusion_model.named_parameters()
            if not name.endswith("input_scale")}


def layer_errors(patcher: Any, run: Callable[[Any], Any], rows: Rows,
                 tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 of every FP8 layer's output in a run of the host against q(x) W + b of the stored tensors.

    Each layer is held against the definition on the input it had, so an earlier layer's rounding does not count. x / s
    and x (1 / s) are the same number but for fp32's last bit, which at a rounding step of FP8 is another code: the nearer
    of both counts.
    """
    weights = rows.to_native(dequantize(dict(tensors)))
    scales: dict[str, set[float]] = {}  # native weight -> the input scales of its stored parts
    for name, (target, _) in rows.places.items():
        if name.endswith(".weight") and tensors[name].dtype == torch.float8_e4m3fn:
            scales.setdefault(target, set()).add(float(tensors[name.replace(".weight", ".input_scale")]))
    errors: dict[str, float] = {}

    def check(name: str):
        def hook(_module: Any, args: tuple, output: torch.Tensor) -> None:
            (scale,) = scales[name]
            bias = weights.get(name.replace(".weight", ".bias"))
            errors[name] = min(rel_l2(output, torch.nn.functional.linear(x, weights[name], bias))
                               for x in quantized_fp8(args[0], torch.tensor(scale)))
        return hook

    hooks = [patcher.get_model_object(f"diffusion_model.{name.removesuffix('.weight')}").register_forward_hook(check(name))
             for name in scales]
    run(patcher)
    for hook in hooks:
        hook.remove()
    assert errors.keys() == scales.keys()
    return errors


class Rows:
    """Where diffusers' rows lie in a native model, told by a converter: each native row carries a tag through it."""

    def __init__(self, shapes: Mapping[str, torch.Size],
                 convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        self.shapes = dict(shapes)
        self.places: dict[str, tuple[str, torch.Tensor]] = {}  # stored name -> native name, its rows
        names, starts, tagged, count = list(shapes), [], {}, 0
        for name, shape in shapes.items():
            starts.append(count)
            tagged[name] = torch.arange(count, count + shape[0]).view(-1, *[1] * (len(shape) - 1))
            count += shape[0]
        converted = {name: tags.flatten() for name, tags in convert(tagged).items()}
        assert torch.equal(torch.cat(list(converted.values())).sort().values, torch.arange(count))  # none lost or double
        for name, tags in converted.items():
            i = bisect_right(starts, int(tags[0])) - 1
            rows = tags - starts[i]
            assert rows.min() >= 0 and rows.max() < shapes[names[i]][0]
            self.places[name] = names[i], rows

    def to_native(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Native tensors made of stored rows, in the stored dtype."""
        native: dict[str, torch.Tensor] = {}
        for name, (target, rows) in self.places.items():
            native.setdefault(target, stored[name].new_empty(self.shapes[target]))[rows] = stored[name]
        return native

    def to_stored(self, name: str, native: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The rows of a stored tensor, taken from native ones; None where there is no such native tensor."""
        target, rows = self.places[name]
        return native[target][rows] if target in native else None

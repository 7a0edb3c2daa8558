"""Checkpoints laid out as in public reports: what a case is, and FLUX.1 and FLUX.2."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support.bitsandbytes import four_bits

from .files import Tensors, text, write
from .formats import BF16, E4M3, F16, F32, convrot, fp8, nvfp4
from .models import flux1, flux2, linears, rand


@dataclass
class Case:
    """`build(folder)` writes the files and returns the truth (None where nothing can be loaded). `ref`, below the case's
    folder, is what a user chooses. `words`: the message of the right refusal has one of these (refusals only)."""

    name: str
    family: str
    build: Callable[[Path | None], Tensors | None]
    ref: str = "model.safetensors"
    words: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()  # native layers that the file asks to multiply in full precision
    no_full_precision: tuple[str, ...] = ()  # and some that it does not
    inputs: dict[str, float] = field(default_factory=dict)  # native layer -> stored static activation scale
    unsaid: tuple[str, ...] = ()  # what `inspect` must not call it
    zero_cond: bool = False
    tolerance: float = 4e-3  # INT8 activations, which the host rounds on every device, cost 0.0075 a Linear


CASES: dict[str, Case] = {}


def case(family: str, **options):
    def register(build: Callable[[Path | None], Tensors | None]) -> Callable:
        name = build.__name__.replace("_", "-")
        CASES[name] = Case(name, family, build, **options)
        return build
    return register


def save(folder: Path | None, tensors: Tensors, metadata: dict[str, str] | None = None,
         name: str = "model.safetensors") -> None:
    if folder is not None:
        write(folder / name, tensors, metadata)


def plain(model: Tensors, dtype: torch.dtype, prefix: str = "") -> Tensors:
    return {prefix + k: v.to(dtype) for k, v in model.items()}


def old_scaled(model: Tensors, layers: list[str], *, rest: torch.dtype, scale_dtype: torch.dtype = F32,
               marker: int | None, inputs: dict[str, float] | None = None, shape: tuple[int, ...] = (),
               prefix: str = "", vector: torch.dtype | None = None) -> tuple[Tensors, Tensors]:
    """ComfyUI's first scaled FP8: weight E4M3, scale_weight, scale_input, and one `scaled_fp8` tensor of `marker` elements.
    `vector`: dtype of biases, norms and modulation where not `rest`. Returns (stored, truth)."""
    stored, truth = {}, {}
    for k, v in model.items():
        layer = k[:-7]
        if k.endswith(".weight") and layer in layers:
            _, scale = fp8(v)
            scale = scale.to(scale_dtype)
            codes, _ = fp8(v, scale.float())
            stored[prefix + k], truth[k] = codes, codes.float() * scale.float()
            stored[f"{prefix}{layer}.scale_weight"] = scale.reshape(shape)
            if inputs is not None:
                stored[f"{prefix}{layer}.scale_input"] = torch.tensor(inputs.get(layer, 1.0)).reshape(shape)
        else:
            stored[prefix + k] = v.to(vector if vector and v.dim() != 2 else rest)
            truth[k] = stored[prefix + k].float()
    if marker is not None:
        stored[prefix + "scaled_fp8"] = torch.zeros(marker, dtype=E4M3)
    return stored, truth


# --- FLUX.1
FLUX1_INPUTS = {"double_blocks.0.img_attn.qkv": 0.0123, "single_blocks.0.linear2": 0.25}


@case("flux1", inputs=FLUX1_INPUTS, no_full_precision=("single_blocks.0.linear1",))
def flux1_comfy_fp8_scaled(folder):
    """flux_dev_fp8_scaled_diffusion_model: every Linear scaled, scale_weight and scale_input [], marker of no elements."""
    model = flux1()
    stored, truth = old_scaled(model, linears(model), rest=BF16, marker=0, inputs=FLUX1_INPUTS)
    save(folder, stored)
    return truth


@case("flux1")
def flux1_all_in_one_fp8(folder):
    """flux1-dev-fp8: unscaled E4M3 for weights, biases and norms under model.diffusion_model., with encoders and VAE."""
    stored = {k: v.to(E4M3) for k, v in flux1().items()}
    extra = {"text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": torch.ones(64, 32).to(F16),
             "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(32, 32).to(F16),
             "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
             "text_encoders.t5xxl.transformer.shared.weight": torch.ones(64, 64).to(E4M3),
             "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(64, 64).to(E4M3),
             "vae.encoder.conv_in.weight": torch.ones(32, 3, 3, 3).to(BF16),
             "vae.decoder.conv_in.weight": torch.ones(32, 16, 3, 3).to(BF16)}
    save(folder, {"model.diffusion_model." + k: v for k, v in stored.items()} | extra, {"format": "pt"})
    return {k: v.float() for k, v in stored.items()}


HINT = "double_blocks.0.img_attn.qkv"


@case("flux1", full_precision=(HINT,), no_full_precision=("single_blocks.0.linear1",))
def flux1_prefixed_bare_metadata(folder):
    """Tensors under model.diffusion_model., layer names in _quantization_metadata without it (the host strips and matches)."""
    model = flux1()
    stored, truth = plain(model, BF16), dict(model)
    named = {}
    for layer in linears(model, "blocks."):
        codes, scale = fp8(model[layer + ".weight"])
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale, layer + ".input_scale": torch.tensor(0.01)}
        truth[layer + ".weight"] = codes.float() * scale
        named[layer] = {"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if layer == HINT else {})}
    save(folder, {"model.diffusion_model." + k: v for k, v in stored.items()},
         {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})})
    return truth


@case("flux1")
def flux1_bfl_nvfp4(folder):
    """FLUX.1-dev-NVFP4 and Kontext: native names, NVFP4 high nibble first in tiles, input_scale, metadata, BF16 modulation."""
    model = flux1()
    stored, truth = plain(model, BF16), dict(model)
    layers = [layer for layer in linears(model, "blocks.") if "mod" not in layer]
    for layer in layers:
        packed, block, second, truth[layer + ".weight"] = nvfp4(model[layer + ".weight"], high_first=True, tiles=True)
        stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second,
                   layer + ".input_scale": torch.tensor(0.005)}
    save(folder, stored, {"_quantization_metadata": json.dumps(
        {"format_version": "1.0", "layers": {layer: {"format": "nvfp4"} for layer in layers}})})
    return truth


@case("flux1")
def flux1_bnb_nf4(folder):
    """flux1-dev-bnb-nf4 (v2; v1 quantizes absmax, too): U8 [N*K/2, 1] with absmax, quant_map, quant_state; all in one."""
    stored: Tensors = {}
    truth: Tensors = {}
    for k, v in flux1().items():
        p = "model.diffusion_model." + k
        if v.dim() == 2 and k.endswith(".weight"):
            leaves, truth[k] = four_bits(v, double="single_blocks" in k)
            stored |= {f"{p.removesuffix('weight')}{leaf}": tensor for leaf, tensor in leaves.items()}
        else:
            stored[p] = v.to(F16)
            truth[k] = stored[p].float()
    save(folder, stored | {"vae.decoder.conv_in.weight": torch.ones(32, 16, 3, 3).to(BF16)})
    return truth


# --- FLUX.2
@case("flux2")
def flux2_nvfp4_mixed_no_input_scale(folder):
    """FLUX.2-dev-NVFP4's mixed file: packed q/k/v, high nibble first, tiles; the txt_mlp layers have no input_scale."""
    model = flux2()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "double_blocks"):
        packed, block, second, truth[layer + ".weight"] = nvfp4(model[layer + ".weight"], high_first=True, tiles=True)
        stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second}
        if "txt_mlp" not in layer:
            stored[layer + ".input_scale"] = torch.tensor(1 / 160.)
    save(folder, stored, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {
        layer: {"format": "nvfp4"} for layer in linears(model, "double_blocks")}})})
    return truth


@case("flux2")
def flux2_scales_bf16_and_pre_quant(folder):
    """A converter's mixed file: FP8 with a BF16 weight_scale, and NVFP4 with a BF16 pre_quant_scale by column; comfy_quant."""
    model = flux2()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "blocks."):
        w = model[layer + ".weight"]
        if "mlp" in layer:
            smooth = (1 + 0.5 * rand(layer, "smooth", shape=(w.shape[1],)).abs()).to(BF16)
            packed, block, second, values = nvfp4(w / smooth.float(), high_first=True, tiles=True)
            stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second,
                       layer + ".pre_quant_scale": smooth, layer + ".comfy_quant": text({"format": "nvfp4"})}
            truth[layer + ".weight"] = values * smooth.float()
        else:
            scale = (w.abs().max() / 448).to(BF16)
            codes, _ = fp8(w, scale.float())
            stored |= {layer + ".weight": codes, layer + ".weight_scale": scale,
                       layer + ".comfy_quant": text({"format": "float8_e4m3fn"})}
            truth[layer + ".weight"] = codes.float() * scale.float()
    save(folder, stored)
    return truth


FULL = ("double_blocks.0.img_attn.proj", "single_blocks.0.linear2")


@case("flux2", full_precision=FULL, no_full_precision=("double_blocks.0.img_mlp.0",))
def flux2_full_precision_hints(folder):
    """FP8 with full_precision_matrix_mult by both transports: the header's metadata for one layer, comfy_quant for another."""
    model = flux2()
    stored, truth = plain(model, BF16), dict(model)
    named = {}
    for layer in linears(model, "blocks."):
        codes, scale = fp8(model[layer + ".weight"])
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale, layer + ".input_scale": torch.tensor(0.01)}
        truth[layer + ".weight"] = codes.float() * scale
        conf = {"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if layer in FULL else {})}
        if layer.startswith("single"):
            stored[layer + ".comfy_quant"] = text(conf)
        else:
            named[layer] = conf
    # the host turns named layers into markers and leaves stored ones alone
    save(folder, stored, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})})
    return truth


# --- INT8 ConvRot, in native names and in diffusers' (FLUX.1 Fill)
@case("flux1", tolerance=0.015, unsaid=("modelslim",))
def flux1_int8_convrot_native(folder):
    """int8_tensorwise with ConvRot, native names (the host's own format): I8, weight_scale F32 [N, 1], comfy_quant."""
    model = flux1()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "blocks."):
        codes, scale, truth[layer + ".weight"] = convrot(model[layer + ".weight"], 64)
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale,
                   layer + ".comfy_quant": text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})}
    save(folder, stored)
    return truth


FLUX1_TOP = {"img_in": "x_embedder", "txt_in": "context_embedder",
             "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
             "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
             "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
             "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
             "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
             "vector_in.out_layer": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out"}
FLUX1_DOUBLE = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"}
FLUX1_NORMS = {"double_blocks.0.img_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_q.weight",
               "double_blocks.0.img_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_k.weight",
               "double_blocks.0.txt_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_added_q.weight",
               "double_blocks.0.txt_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_added_k.weight",
               "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
               "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k.weight"}


def flux1_diffusers(model: Tensors) -> Tensors:
    """diffusers' names: q, k, v (and proj_mlp) apart, the last modulation's halves exchanged."""
    out = {}
    for k, v in model.items():
        module, _, leaf = k.rpartition(".")
        h = model["img_in.weight"].shape[0]
        if k in FLUX1_NORMS:
            out[FLUX1_NORMS[k]] = v
        elif module in FLUX1_TOP:
            out[f"{FLUX1_TOP[module]}.{leaf}"] = v
        elif module == "final_layer.adaLN_modulation.1":
            out[f"norm_out.linear.{leaf}"] = torch.cat(tuple(reversed(v.chunk(2))))
        elif module.startswith("double_blocks.0."):
            inner = module.removeprefix("double_blocks.0.")
            if inner.endswith("_attn.qkv"):
                names = ("to_q", "to_k", "to_v") if inner.startswith("img") else ("add_q_proj", "add_k_proj", "add_v_proj")
                for n, part in zip(names, v.chunk(3), strict=True):
                    out[f"transformer_blocks.0.attn.{n}.{leaf}"] = part
            else:
                out[f"transformer_blocks.0.{FLUX1_DOUBLE[inner]}.{leaf}"] = v
        elif module == "single_blocks.0.linear1":
            for n, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), v.split([h, h, h, 4 * h]), strict=True):
                out[f"single_transformer_blocks.0.{n}.{leaf}"] = part
        else:
            inner = {"single_blocks.0.modulation.lin": "norm.linear", "single_blocks.0.linear2": "proj_out"}[module]
            out[f"single_transformer_blocks.0.{inner}.{leaf}"] = v
    return out


def flux1_native(model: Tensors) -> Tensors:
    """The way back."""
    out = {native: model[name] for native, name in FLUX1_NORMS.items()}
    for leaf in ("weight", "bias"):
        for native, name in FLUX1_TOP.items():
            out[f"{native}.{leaf}"] = model[f"{name}.{leaf}"]
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat(tuple(reversed(model[f"norm_out.linear.{leaf}"].chunk(2))))
        p = "transformer_blocks.0."
        for native, name in FLUX1_DOUBLE.items():
            out[f"double_blocks.0.{native}.{leaf}"] = model[f"{p}{name}.{leaf}"]
        for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            out[f"double_blocks.0.{side}_attn.qkv.{leaf}"] = torch.cat([model[f"{p}attn.{n}.{leaf}"] for n in names])
        p = "single_transformer_blocks.0."
        out[f"single_blocks.0.modulation.lin.{leaf}"] = model[f"{p}norm.linear.{leaf}"]
        out[f"single_blocks.0.linear2.{leaf}"] = model[f"{p}proj_out.{leaf}"]
        out[f"single_blocks.0.linear1.{leaf}"] = torch.cat(
            [model[f"{p}{n}.{leaf}"] for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    return out


@case("flux1-fill", tolerance=0.015)
def flux1_fill_int8_convrot_diffusers(folder):
    """FLUX.1 Fill (384 channels in) in diffusers' names, INT8 ConvRot with comfy_quant markers, a single file."""
    model = flux1_diffusers(flux1(channels=384))
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "transformer_blocks."):
        codes, scale, truth[layer + ".weight"] = convrot(model[layer + ".weight"], 64)
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale,
                   layer + ".comfy_quant": text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64})}
    save(folder, stored)
    return flux1_native(truth)

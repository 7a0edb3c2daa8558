"""FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth, Krea): diffusers FluxTransformer2DModel <-> ComfyUI's Flux.

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_flux_transformer_checkpoint_to_diffusers), read backwards. The host fuses q, k, v into one Linear, and q, k, v
and the MLP's first layer into linear1; the last modulation has shift and scale the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from .base import Dims, Inputs, Module, Naming, config_int, count_blocks, expand, fused, linear, norm, shape_of

HEAD = 128  # fixed in ComfyUI: head size, rotary axes, MLP ratio 4, 256 timestep channels
AXES = [16, 56, 56]

TOP = {
    "img_in": linear("x_embedder", "h", "in"),
    "txt_in": linear("context_embedder", "h", "text"),
    "time_in.in_layer": linear("time_text_embed.timestep_embedder.linear_1", "h", 256),
    "time_in.out_layer": linear("time_text_embed.timestep_embedder.linear_2", "h", "h"),
    "vector_in.in_layer": linear("time_text_embed.text_embedder.linear_1", "h", "pooled"),
    "vector_in.out_layer": linear("time_text_embed.text_embedder.linear_2", "h", "h"),
}
GUIDANCE = {
    "guidance_in.in_layer": linear("time_text_embed.guidance_embedder.linear_1", "h", 256),
    "guidance_in.out_layer": linear("time_text_embed.guidance_embedder.linear_2", "h", "h"),
}
DOUBLE = {
    "img_mod.lin": linear("norm1.linear", "6h", "h"),
    "txt_mod.lin": linear("norm1_context.linear", "6h", "h"),
    "img_attn.qkv": fused(("attn.to_q", "attn.to_k", "attn.to_v"), ("h", "h", "h"), "h"),
    "txt_attn.qkv": fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("h", "h", "h"), "h"),
    "img_attn.norm.query_norm": norm("attn.norm_q", HEAD, leaf="scale"),
    "img_attn.norm.key_norm": norm("attn.norm_k", HEAD, leaf="scale"),
    "txt_attn.norm.query_norm": norm("attn.norm_added_q", HEAD, leaf="scale"),
    "txt_attn.norm.key_norm": norm("attn.norm_added_k", HEAD, leaf="scale"),
    "img_attn.proj": linear("attn.to_out.0", "h", "h"),
    "txt_attn.proj": linear("attn.to_add_out", "h", "h"),
    "img_mlp.0": linear("ff.net.0.proj", "4h", "h"),
    "img_mlp.2": linear("ff.net.2", "h", "4h"),
    "txt_mlp.0": linear("ff_context.net.0.proj", "4h", "h"),
    "txt_mlp.2": linear("ff_context.net.2", "h", "4h"),
}
SINGLE = {
    "modulation.lin": linear("norm.linear", "3h", "h"),
    "linear1": fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("h", "h", "h", "4h"), "h"),
    "linear2": linear("proj_out", "h", "5h"),
    "norm.query_norm": norm("attn.norm_q", HEAD, leaf="scale"),
    "norm.key_norm": norm("attn.norm_k", HEAD, leaf="scale"),
}
LAST = {
    # diffusers: scale | shift, native: shift | scale
    "final_layer.adaLN_modulation.1": linear("norm_out.linear", "2h", "h", swap_halves=True),
    "final_layer.linear": linear("proj_out", "out", "h"),
}

_DIFFUSERS_BLOCK = re.compile(r"^single_transformer_blocks\.\d+\.proj_mlp\.", re.MULTILINE)
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)double_blocks\.\d+\.img_mod\.lin\.", re.MULTILINE)
_NOT_FLUX1 = ("distilled_guidance_layer", "token_refiner", "individual_token_refiner", "double_stream_modulation_img",
              "controlnet_", "qkv_proj.",
              "time_embed.timestep_embedder.", "context_embedder_norm.")  # LongCat; Ovis


class Flux1:
    """FLUX.1. Dims: hidden, in, out, text, pooled, double, single, guidance (0 or 1)."""

    name = "FLUX.1"
    class_names = frozenset({"FluxTransformer2DModel"})
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if any(mark in text for mark in _NOT_FLUX1):
            return None
        if _DIFFUSERS_BLOCK.search(text):
            return Naming("diffusers")
        native = _NATIVE_BLOCK.search(text) if "vector_in." in text else None  # LongCat and Ovis have none
        return Naming("native", native["prefix"], "scale" if "_norm.scale" in text else "weight") if native else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers, prefix = naming.style == "diffusers", naming.prefix

        def shape(native: str) -> tuple[int, ...]:
            stored = {**TOP, **LAST}[native].parts[0] if diffusers else f"{prefix}{native}"
            return shape_of(tensors, f"{stored}.weight")

        guidance = "time_text_embed.guidance_embedder." if diffusers else f"{prefix}guidance_in."
        hidden, channels = shape("img_in")
        return {
            "hidden": hidden, "in": channels, "out": shape("final_layer.linear")[0],
            "text": shape("txt_in")[1], "pooled": shape("vector_in.in_layer")[1],
            "double": count_blocks(tensors, "transformer_blocks" if diffusers else f"{prefix}double_blocks"),
            "single": count_blocks(tensors, "single_transformer_blocks" if diffusers else f"{prefix}single_blocks"),
            "guidance": int(any(name.startswith(guidance) for name in tensors)),
        }

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (FluxTransformer2DModel.__init__) for keys that a config leaves out
        head, axes = config_int(config, "attention_head_dim", 128), list(config.get("axes_dims_rope") or AXES)
        if head != HEAD or axes != AXES or config_int(config, "patch_size", 1) != 1:
            raise ValueError(
                Text("ComfyUI runs FLUX.1 with heads of {head} and rotary axes {axes}, patch_size 1 only; config.json "
                     "says {said_head}, {said_axes} and {said_patch}", head=HEAD, axes=AXES, said_head=head,
                     said_axes=axes, said_patch=config.get("patch_size", 1)))
        channels = config_int(config, "in_channels", 64)
        return {
            "hidden": head * config_int(config, "num_attention_heads", 24), "in": channels,
            "out": config_int(config, "out_channels", channels),
            "text": config_int(config, "joint_attention_dim", 4096),
            "pooled": config_int(config, "pooled_projection_dim", 768),
            "double": config_int(config, "num_layers", 19), "single": config_int(config, "num_single_layers", 38),
            "guidance": int(bool(config.get("guidance_embeds", False))),
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        if unet_config.get("image_model") != "flux" or not unet_config.get("vec_in_dim"):
            return None  # LongCat and Ovis share the host's class
        patch = unet_config["patch_size"] ** 2
        return {
            "hidden": unet_config["hidden_size"], "in": unet_config["in_channels"] * patch,
            "out": unet_config["out_channels"] * patch, "text": unet_config["context_in_dim"],
            "pooled": unet_config["vec_in_dim"], "double": unet_config["depth"],
            "single": unet_config["depth_single_blocks"], "guidance": int(unet_config["guidance_embed"]),
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "h": dims["hidden"], **{f"{n}h": n * dims["hidden"] for n in range(2, 7)}}
        yield from expand({**TOP, **GUIDANCE} if dims["guidance"] else TOP, sizes, naming)
        for i in range(dims["double"]):
            yield from expand(DOUBLE, sizes, naming, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        for i in range(dims["single"]):
            yield from expand(SINGLE, sizes, naming, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        yield from expand(LAST, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((256, dims["text"]), dims["pooled"])  # T5 pads to 256, CLIP-L pools


FLUX1 = Flux1()

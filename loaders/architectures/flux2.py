"""FLUX.2 (dev, klein): diffusers Flux2Transformer2DModel <-> ComfyUI's Flux with image_model "flux2".

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_flux2_transformer_checkpoint_to_diffusers), read backwards. Only q, k, v of the double blocks are stored apart:
diffusers' single blocks are fused as the vendor's are. Modulation is shared by all blocks of a kind. No Linear has a
bias. The feed-forward's gate and value halves have the same order on both sides; shift and scale of the last
modulation have not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..containers.safetensors import TensorInfo
from .base import (
    Dims,
    Inputs,
    Module,
    Naming,
    check_fixed,
    config_int,
    count_blocks,
    expand,
    fused,
    linear,
    norm,
    shape_of,
)

HEAD, CHANNELS = 128, 128
# Fixed in ComfyUI (comfy/model_detection.py, "flux2"; comfy/ldm/flux/layers.py); also diffusers' defaults.
FIXED = {"attention_head_dim": HEAD, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "mlp_ratio": 3.0,
         "patch_size": 1, "in_channels": CHANNELS, "out_channels": CHANNELS, "timestep_guidance_channels": 256,
         "eps": 1e-6}

TOP = {
    "img_in": linear("x_embedder", "h", "in", bias=False),
    "time_in.in_layer": linear("time_guidance_embed.timestep_embedder.linear_1", "h", 256, bias=False),
    "time_in.out_layer": linear("time_guidance_embed.timestep_embedder.linear_2", "h", "h", bias=False),
    "txt_in": linear("context_embedder", "h", "text", bias=False),
}
GUIDANCE = {
    "guidance_in.in_layer": linear("time_guidance_embed.guidance_embedder.linear_1", "h", 256, bias=False),
    "guidance_in.out_layer": linear("time_guidance_embed.guidance_embedder.linear_2", "h", "h", bias=False),
}
DOUBLE = {
    "img_attn.qkv": fused(("attn.to_q", "attn.to_k", "attn.to_v"), ("h", "h", "h"), "h", bias=False),
    "img_attn.norm.query_norm": norm("attn.norm_q", HEAD, leaf="scale"),
    "img_attn.norm.key_norm": norm("attn.norm_k", HEAD, leaf="scale"),
    "img_attn.proj": linear("attn.to_out.0", "h", "h", bias=False),
    "img_mlp.0": linear("ff.linear_in", "6h", "h", bias=False),
    "img_mlp.2": linear("ff.linear_out", "h", "3h", bias=False),
    "txt_attn.qkv": fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("h", "h", "h"), "h", bias=False),
    "txt_attn.norm.query_norm": norm("attn.norm_added_q", HEAD, leaf="scale"),
    "txt_attn.norm.key_norm": norm("attn.norm_added_k", HEAD, leaf="scale"),
    "txt_attn.proj": linear("attn.to_add_out", "h", "h", bias=False),
    "txt_mlp.0": linear("ff_context.linear_in", "6h", "h", bias=False),
    "txt_mlp.2": linear("ff_context.linear_out", "h", "3h", bias=False),
}
SINGLE = {
    "linear1": linear("attn.to_qkv_mlp_proj", "9h", "h", bias=False),
    "linear2": linear("attn.to_out", "h", "4h", bias=False),
    "norm.query_norm": norm("attn.norm_q", HEAD, leaf="scale"),
    "norm.key_norm": norm("attn.norm_k", HEAD, leaf="scale"),
}
LAST = {
    "final_layer.linear": linear("proj_out", "out", "h", bias=False),
    # diffusers: scale | shift, native: shift | scale
    "final_layer.adaLN_modulation.1": linear("norm_out.linear", "2h", "h", bias=False, swap_halves=True),
    "double_stream_modulation_img.lin": linear("double_stream_modulation_img.linear", "6h", "h", bias=False),
    "double_stream_modulation_txt.lin": linear("double_stream_modulation_txt.linear", "6h", "h", bias=False),
    "single_stream_modulation.lin": linear("single_stream_modulation.linear", "3h", "h", bias=False),
}

# The shared modulation is what tells FLUX.2 from FLUX.1 and Chroma; the block, a transformer from something beside it.
_DIFFUSERS_BLOCK = re.compile(r"^single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\.weight$", re.MULTILINE)
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)single_blocks\.\d+\.linear1\.weight$", re.MULTILINE)
_NOT_FLUX2 = ("distilled_guidance_layer", "token_refiner", "controlnet_", "control_", "qkv_proj.")


class Flux2:
    """FLUX.2. Dims: hidden, in, out, text, double, single, guidance (0 or 1; klein has none)."""

    name = "FLUX.2"
    class_names = frozenset({"Flux2Transformer2DModel"})
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if "double_stream_modulation_img.lin" not in text or any(mark in text for mark in _NOT_FLUX2):
            return None
        if _DIFFUSERS_BLOCK.search(text):
            return Naming("diffusers")
        native = _NATIVE_BLOCK.search(text)
        return Naming("native", native["prefix"], "scale" if "_norm.scale" in text else "weight") if native else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers, prefix = naming.style == "diffusers", naming.prefix

        def shape(native: str) -> tuple[int, ...]:
            stored = {**TOP, **LAST}[native].parts[0] if diffusers else f"{prefix}{native}"
            return shape_of(tensors, f"{stored}.weight")

        guidance = "time_guidance_embed.guidance_embedder." if diffusers else f"{prefix}guidance_in."
        hidden, channels = shape("img_in")
        return {
            "hidden": hidden, "in": channels, "out": shape("final_layer.linear")[0], "text": shape("txt_in")[1],
            "double": count_blocks(tensors, "transformer_blocks" if diffusers else f"{prefix}double_blocks"),
            "single": count_blocks(tensors, "single_transformer_blocks" if diffusers else f"{prefix}single_blocks"),
            "guidance": int(any(name.startswith(guidance) for name in tensors)),
        }

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (Flux2Transformer2DModel.__init__) for keys that a config leaves out
        check_fixed(config, FIXED, self.name)
        return {
            "hidden": HEAD * config_int(config, "num_attention_heads", 48), "in": CHANNELS, "out": CHANNELS,
            "text": config_int(config, "joint_attention_dim", 15360),
            "double": config_int(config, "num_layers", 8), "single": config_int(config, "num_single_layers", 48),
            "guidance": int(bool(config.get("guidance_embeds", True))),
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        if unet_config.get("image_model") != "flux2":
            return None
        return {
            "hidden": unet_config["hidden_size"], "in": unet_config["in_channels"],
            "out": unet_config["out_channels"], "text": unet_config["context_in_dim"],
            "double": unet_config["depth"], "single": unet_config["depth_single_blocks"],
            "guidance": int(unet_config["guidance_embed"]),
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "h": dims["hidden"], **{f"{n}h": n * dims["hidden"] for n in (2, 3, 4, 6, 9)}}
        yield from expand({**TOP, **GUIDANCE} if dims["guidance"] else TOP, sizes, naming)
        for i in range(dims["double"]):
            yield from expand(DOUBLE, sizes, naming, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        for i in range(dims["single"]):
            yield from expand(SINGLE, sizes, naming, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        yield from expand(LAST, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((512, dims["text"]), patch=1)  # the host pads to 512; 2 x 2 are in the channels of its latents


FLUX2 = Flux2()

"""HunyuanVideo 1.0 (T2V, I2V, SkyReels): diffusers HunyuanVideoTransformer3DModel <-> ComfyUI's HunyuanVideo.

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_hunyuan_video_transformer_to_diffusers), read backwards. ComfyUI builds this model from FLUX.1's blocks
(comfy/ldm/hunyuan_video/model.py), so block tables are FLUX.1's; the token refiner before them is its own.

Three sets of names are in use: diffusers', ComfyUI's ("native", what it saves) and those of the first release
("vendor"), which ComfyUI renames while loading (comfy/supported_models.py, HunyuanVideo.process_unet_state_dict).
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
    conv,
    count_blocks,
    expand,
    fused,
    linear,
    norm,
    shape_of,
)
from .flux1 import DOUBLE, HEAD, LAST, SINGLE

PATCH = (1, 2, 2)  # time, height, width
REFINERS, POOLED = 2, 768
# Fixed in ComfyUI (comfy/model_detection.py, "Hunyuan Video"; the refiner's depth in its model); diffusers' defaults.
FIXED = {"attention_head_dim": HEAD, "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0, "mlp_ratio": 4.0,
         "patch_size": PATCH[1], "patch_size_t": PATCH[0], "num_refiner_layers": REFINERS, "qk_norm": "rms_norm",
         "pooled_projection_dim": POOLED}

TOP = {
    "img_in.proj": conv("x_embedder.proj", "h", "in", *PATCH),
    "time_in.in_layer": linear("time_text_embed.timestep_embedder.linear_1", "h", 256),
    "time_in.out_layer": linear("time_text_embed.timestep_embedder.linear_2", "h", "h"),
    "vector_in.in_layer": linear("time_text_embed.text_embedder.linear_1", "h", POOLED),
    "vector_in.out_layer": linear("time_text_embed.text_embedder.linear_2", "h", "h"),
}
GUIDANCE = {
    "guidance_in.in_layer": linear("time_text_embed.guidance_embedder.linear_1", "h", 256),
    "guidance_in.out_layer": linear("time_text_embed.guidance_embedder.linear_2", "h", "h"),
}
TEXT = {
    "input_embedder": linear("proj_in", "h", "text"),
    "t_embedder.in_layer": linear("time_text_embed.timestep_embedder.linear_1", "h", 256),
    "t_embedder.out_layer": linear("time_text_embed.timestep_embedder.linear_2", "h", "h"),
    "c_embedder.in_layer": linear("time_text_embed.text_embedder.linear_1", "h", "text"),
    "c_embedder.out_layer": linear("time_text_embed.text_embedder.linear_2", "h", "h"),
}
REFINER = {
    # two gates, in the same order on both sides: unlike the last modulation, its halves stay where they are
    "adaLN_modulation.1": linear("norm_out.linear", "2h", "h"),
    "norm1": norm("norm1", "h", bias=True),
    "self_attn.qkv": fused(("attn.to_q", "attn.to_k", "attn.to_v"), ("h", "h", "h"), "h"),
    "self_attn.proj": linear("attn.to_out.0", "h", "h"),
    "norm2": norm("norm2", "h", bias=True),
    "mlp.0": linear("ff.net.0.proj", "4h", "h"),
    "mlp.2": linear("ff.net.2", "h", "4h"),
}

# How a native module's name ends, and how the vendor's does; the first that fits.
VENDOR = {
    "time_in.in_layer": "time_in.mlp.0", "time_in.out_layer": "time_in.mlp.2",
    "guidance_in.in_layer": "guidance_in.mlp.0", "guidance_in.out_layer": "guidance_in.mlp.2",
    "t_embedder.in_layer": "t_embedder.mlp.0", "t_embedder.out_layer": "t_embedder.mlp.2",
    "c_embedder.in_layer": "c_embedder.linear_1", "c_embedder.out_layer": "c_embedder.linear_2",
    "_mod.lin": "_mod.linear", ".modulation.lin": ".modulation.linear",
    "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "_attn.qkv": "_attn_qkv", "_attn.proj": "_attn_proj",
    "_attn.norm.query_norm": "_attn_q_norm", "_attn.norm.key_norm": "_attn_k_norm",
    ".norm.query_norm": ".q_norm", ".norm.key_norm": ".k_norm",
}

_DIFFUSERS_BLOCK = re.compile(r"^context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn\.to_q\.weight$",
                              re.MULTILINE)
_DIFFUSERS_POOLED = re.compile(r"^time_text_embed\.text_embedder\.linear_1\.weight$", re.MULTILINE)
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|model\.model\.|)"  # the second: ComfyUI's own save
                           r"txt_in\.individual_token_refiner\.blocks\.\d+\.self_attn(?P<dot>[._])qkv\.weight$",
                           re.MULTILINE)
# HunyuanVideo 1.5, HunyuanImage and FramePack have the same refiner and blocks, and more; the first two take no pooled
# text either.
_NOT_HUNYUAN = ("cond_type_embed", "vision_in.", "byt5_in.", "time_r_in.", "context_embedder_2.", "image_embedder.",
                "clean_x_embedder.", "image_projection.", "controlnet_", "control_", "qkv_proj.")


def _vendor(native: str) -> str:
    """The vendor's name of a native module."""
    for end, theirs in VENDOR.items():
        if native.endswith(end):
            return native.removesuffix(end) + theirs
    return native


class HunyuanVideo:
    """HunyuanVideo. Dims: hidden, in (16, or 32 and 33 with an image), out, text, double, single, guidance (0 or 1)."""

    name = "HunyuanVideo"
    class_names = frozenset({"HunyuanVideoTransformer3DModel"})
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if "token_refiner" not in text or any(mark in text for mark in _NOT_HUNYUAN):
            return None
        if _DIFFUSERS_BLOCK.search(text):
            return Naming("diffusers") if _DIFFUSERS_POOLED.search(text) else None
        native = _NATIVE_BLOCK.search(text)
        if native is None or f"{native['prefix']}vector_in.in_layer.weight" not in text:
            return None
        if native["dot"] == "_":
            return Naming("vendor", native["prefix"])
        return Naming("native", native["prefix"], "scale" if "_norm.scale" in text else "weight")

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers, prefix = naming.style == "diffusers", naming.prefix

        def shape(stored: str, native: str, dimensions: int = 2) -> tuple[int, ...]:
            return shape_of(tensors, f"{stored if diffusers else prefix + native}.weight", dimensions)

        guidance = "time_text_embed.guidance_embedder." if diffusers else f"{prefix}guidance_in."
        hidden, channels = shape("x_embedder.proj", "img_in.proj", 5)[:2]
        return {
            "hidden": hidden, "in": channels, "out": shape("proj_out", "final_layer.linear")[0],
            "text": shape("context_embedder.proj_in", "txt_in.input_embedder")[1],
            "double": count_blocks(tensors, "transformer_blocks" if diffusers else f"{prefix}double_blocks"),
            "single": count_blocks(tensors, "single_transformer_blocks" if diffusers else f"{prefix}single_blocks"),
            "guidance": int(any(name.startswith(guidance) for name in tensors)),
        }

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (HunyuanVideoTransformer3DModel.__init__) for keys that a config leaves out
        check_fixed(config, FIXED, self.name)
        return {
            "hidden": HEAD * config_int(config, "num_attention_heads", 24),
            "in": config_int(config, "in_channels", 16),
            "out": PATCH[0] * PATCH[1] * PATCH[2] * config_int(config, "out_channels", 16),
            "text": config_int(config, "text_embed_dim", 4096),
            "double": config_int(config, "num_layers", 20), "single": config_int(config, "num_single_layers", 40),
            "guidance": int(bool(config.get("guidance_embeds", True))),
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        # one image_model for the whole family: only 1.0 pools the text to 768 and has none of the later modules
        if unet_config.get("image_model") != "hunyuan_video" or unet_config["vec_in_dim"] != POOLED \
                or tuple(unet_config["patch_size"]) != PATCH or unet_config["vision_in_dim"] is not None \
                or any(unet_config[later] for later in ("byt5", "meanflow", "use_cond_type_embedding")):
            return None
        return {
            "hidden": unet_config["hidden_size"], "in": unet_config["in_channels"],
            "out": unet_config["out_channels"] * PATCH[0] * PATCH[1] * PATCH[2], "text": unet_config["context_in_dim"],
            "double": unet_config["depth"], "single": unet_config["depth_single_blocks"],
            "guidance": int(unet_config["guidance_embed"]),
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        for module in self._modules(dims, naming):
            yield module._replace(stored=(_vendor(module.stored[0]),)) if naming.style == "vendor" else module

    def _modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "h": dims["hidden"], **{f"{n}h": n * dims["hidden"] for n in range(2, 7)}}
        yield from expand({**TOP, **GUIDANCE} if dims["guidance"] else TOP, sizes, naming)
        yield from expand(TEXT, sizes, naming, "txt_in.", "context_embedder.")
        for i in range(REFINERS):
            yield from expand(REFINER, sizes, naming, f"txt_in.individual_token_refiner.blocks.{i}.",
                              f"context_embedder.token_refiner.refiner_blocks.{i}.")
        for i in range(dims["double"]):
            yield from expand(DOUBLE, sizes, naming, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        for i in range(dims["single"]):
            yield from expand(SINGLE, sizes, naming, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        yield from expand(LAST, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((256, dims["text"]), POOLED, PATCH[1])  # LLaMA pads to 256, CLIP-L pools


HUNYUAN_VIDEO = HunyuanVideo()

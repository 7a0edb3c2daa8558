"""Wan2.1 and Wan2.2 (T2V, I2V, FLF2V, TI2V): diffusers WanTransformer3DModel <-> ComfyUI's WanModel. SkyReels-V2 and
ChronoEdit are the same network under other classes.

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_wan_transformer_to_diffusers), read backwards; the position embedding of FLF2V, which that converter leaves out,
is by the two forwards (WanImageEmbedding.pos_embed, MLPProj.emb_pos). Both sides have the same layers one to one, so
nothing is fused and every stored byte stays where it is.

The two experts of Wan2.2 A14B are two models of these same names and sizes. Of two latent frames ChronoEdit places the
second at `rope_temporal_skip_len` - 1 (ChronoEditRotaryPosEmbed), which the host leaves to its node ScaleROPE.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...host.texts import Text, joined
from ..containers.safetensors import TensorInfo
from .base import (
    Dims,
    Inputs,
    Module,
    Naming,
    config_int,
    conv,
    count_blocks,
    expand,
    linear,
    norm,
    parameter,
    shape_of,
)

# Fixed in ComfyUI: its detection (comfy/model_detection.py, "Wan 2.1") sets these or leaves WanModel's defaults.
HEAD, PATCH, TEXT, FREQUENCIES, IMAGE, EPSILON, QK_NORM = 128, [1, 2, 2], 4096, 256, 1280, 1e-6, "rms_norm_across_heads"
LATENTS = (16, 48)  # output channels: the latents of Wan2.1 and A14B, and of Wan2.2 5B
WITH_IMAGE = (36, 48)  # input channels that it knows a model with an image embedder by: I2V and Fun Control
# diffusers' defaults for keys that a config leaves out: heads, ffn_dim, layers
DEFAULTS = {"WanTransformer3DModel": (40, 13824, 40), "ChronoEditTransformer3DModel": (40, 13824, 40),
            "SkyReelsV2Transformer3DModel": (16, 8192, 32)}

TOP = {
    "patch_embedding": conv("patch_embedding", "hidden", "in", *PATCH),
    "text_embedding.0": linear("condition_embedder.text_embedder.linear_1", "hidden", TEXT),
    "text_embedding.2": linear("condition_embedder.text_embedder.linear_2", "hidden", "hidden"),
    "time_embedding.0": linear("condition_embedder.time_embedder.linear_1", "hidden", FREQUENCIES),
    "time_embedding.2": linear("condition_embedder.time_embedder.linear_2", "hidden", "hidden"),
    "time_projection.1": linear("condition_embedder.time_proj", "6hidden", "hidden"),
}
BLOCK = {
    "": parameter("modulation", "scale_shift_table", 1, 6, "hidden"),
    "self_attn.q": linear("attn1.to_q", "hidden", "hidden"),
    "self_attn.k": linear("attn1.to_k", "hidden", "hidden"),
    "self_attn.v": linear("attn1.to_v", "hidden", "hidden"),
    "self_attn.o": linear("attn1.to_out.0", "hidden", "hidden"),
    "self_attn.norm_q": norm("attn1.norm_q", "hidden"),
    "self_attn.norm_k": norm("attn1.norm_k", "hidden"),
    # diffusers numbers the norms in the order of use, the vendor does not; norm1 and the third have no weights
    "norm3": norm("norm2", "hidden", bias=True),
    "cross_attn.q": linear("attn2.to_q", "hidden", "hidden"),
    "cross_attn.k": linear("attn2.to_k", "hidden", "hidden"),
    "cross_attn.v": linear("attn2.to_v", "hidden", "hidden"),
    "cross_attn.o": linear("attn2.to_out.0", "hidden", "hidden"),
    "cross_attn.norm_q": norm("attn2.norm_q", "hidden"),
    "cross_attn.norm_k": norm("attn2.norm_k", "hidden"),
}
BLOCK_IMAGE = {
    "cross_attn.k_img": linear("attn2.add_k_proj", "hidden", "hidden"),
    "cross_attn.v_img": linear("attn2.add_v_proj", "hidden", "hidden"),
    "cross_attn.norm_k_img": norm("attn2.norm_added_k", "hidden"),
}
BLOCK_FFN = {
    "ffn.0": linear("ffn.net.0.proj", "ffn", "hidden"),
    "ffn.2": linear("ffn.net.2", "hidden", "ffn"),
}
LAST = {
    "head": parameter("modulation", "scale_shift_table", 1, 2, "hidden"),
    "head.head": linear("proj_out", "4out", "hidden"),  # a patch of 1 x 2 x 2 in every channel
}
IMAGE_EMBEDDER = {
    "img_emb.proj.0": norm("condition_embedder.image_embedder.norm1", IMAGE, bias=True),
    "img_emb.proj.1": linear("condition_embedder.image_embedder.ff.net.0.proj", IMAGE, IMAGE),
    "img_emb.proj.3": linear("condition_embedder.image_embedder.ff.net.2", "hidden", IMAGE),
    "img_emb.proj.4": norm("condition_embedder.image_embedder.norm2", "hidden", bias=True),
}
POSITIONS = {
    "img_emb": parameter("emb_pos", "pos_embed", 1, "positions", IMAGE, part="condition_embedder.image_embedder"),
}

_DIFFUSERS = tuple(re.compile(mark, re.MULTILINE) for mark in (
    r"^blocks\.\d+\.attn2\.to_q\.", r"^condition_embedder\.time_proj\.", r"^scale_shift_table$"))
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)blocks\.\d+\.cross_attn\.q\.", re.MULTILINE)
# What only models built around Wan have: VACE, Fun Camera, S2V, HuMo and MultiTalk, Animate (both namings), SCAIL and
# WanDancer, Fun Control with a reference, SkyReels-V2 DF, AnyFlow
_NOT_WAN = ("vace_", "control_adapter.", "casual_audio_encoder.", "audio_proj.", "face_adapter.", "motion_encoder.",
            "patch_embedding_", "ref_conv.", "fps_embedding.", "delta_embedder.")


class Wan:
    """Wan. Dims: hidden, in, out, ffn, layers, image (0 or 1: an image embedder), positions (of FLF2V, else 0)."""

    name = "Wan"
    class_names = frozenset(DEFAULTS)
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if any(mark in text for mark in _NOT_WAN):
            return None
        if all(mark.search(text) for mark in _DIFFUSERS):
            return Naming("diffusers")
        native = _NATIVE_BLOCK.search(text)
        return Naming("native", native["prefix"]) if native and f"{native['prefix']}head.modulation" in names else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers, prefix = naming.style == "diffusers", naming.prefix

        def shape(stored: str, native: str, dimensions: int = 2) -> tuple[int, ...]:
            return shape_of(tensors, stored if diffusers else prefix + native, dimensions)

        # rows only: the columns of a packed weight are not its inputs
        patch = shape("patch_embedding.weight", "patch_embedding.weight", 5)
        embedder = "condition_embedder.image_embedder." if diffusers else f"{prefix}img_emb."
        positions = embedder + ("pos_embed" if diffusers else "emb_pos")
        return _runnable({
            "hidden": patch[0], "in": patch[1], "out": shape("proj_out.weight", "head.head.weight")[0] // 4,
            "ffn": shape("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.0.weight")[0],
            "layers": count_blocks(tensors, "blocks" if diffusers else f"{prefix}blocks"),
            "image": int(any(name.startswith(embedder) for name in tensors)),
            "positions": shape_of(tensors, positions, 3)[1] if positions in tensors else 0,
        })

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        heads, ffn, layers = DEFAULTS[config.get("_class_name") or "WanTransformer3DModel"]
        # the last two are SkyReels-V2's: rates of frames as an input, and frames that attend in blocks
        fixed = {"attention_head_dim": HEAD, "patch_size": PATCH, "text_dim": TEXT, "freq_dim": FREQUENCIES,
                 "eps": EPSILON, "qk_norm": QK_NORM, "cross_attn_norm": True, "inject_sample_info": False,
                 "num_frame_per_block": 1}
        differences = [Text("{key} {value} only, config.json says {said}", key=key, value=value, said=config[key])
                       for key, value in fixed.items() if config.get(key) not in (None, value)]
        hidden = HEAD * config_int(config, "num_attention_heads", heads)
        # null means that there is no image embedder, and is the default
        image, added = config_int(config, "image_dim", 0), config_int(config, "added_kv_proj_dim", 0)
        if (image, added) not in ((0, 0), (IMAGE, hidden)):
            differences.append(Text("image_dim {image} and added_kv_proj_dim {hidden}, or neither, config.json says "
                                    "{said_image} and {said_added}", image=IMAGE, hidden=hidden,
                                    said_image=config.get("image_dim"), said_added=config.get("added_kv_proj_dim")))
        if differences:
            raise ValueError(Text("ComfyUI runs Wan with {differences}", differences=joined("; ", differences)))
        channels = config_int(config, "in_channels", 16)
        return _runnable({
            "hidden": hidden, "in": channels,
            "out": config_int(config, "out_channels", channels if "out_channels" in config else 16),
            "ffn": config_int(config, "ffn_dim", ffn), "layers": config_int(config, "num_layers", layers),
            "image": int(image > 0), "positions": config_int(config, "pos_embed_seq_len", 0) if image else 0,
        })

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        if unet_config.get("image_model") != "wan2.1" or unet_config.get("model_type") not in ("t2v", "i2v"):
            return None
        if unet_config.get("in_dim_ref_conv") is not None:
            return None
        return {
            "hidden": unet_config["dim"], "in": unet_config["in_dim"], "out": unet_config["out_dim"],
            "ffn": unet_config["ffn_dim"], "layers": unet_config["num_layers"],
            "image": int(unet_config["model_type"] == "i2v"),
            "positions": unet_config.get("flf_pos_embed_token_number") or 0,
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "6hidden": 6 * dims["hidden"], "4out": 4 * dims["out"]}
        block = {**BLOCK, **BLOCK_IMAGE, **BLOCK_FFN} if dims["image"] else {**BLOCK, **BLOCK_FFN}
        yield from expand(TOP, sizes, naming)
        for i in range(dims["layers"]):
            yield from expand(block, sizes, naming, f"blocks.{i}.", f"blocks.{i}.")
        yield from expand(LAST, sizes, naming)
        if dims["image"]:
            yield from expand({**IMAGE_EMBEDDER, **POSITIONS} if dims["positions"] else IMAGE_EMBEDDER, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((512, TEXT), patch=PATCH[1])  # UMT5 pads to 512; without a picture the host fills its channels


def _runnable(dims: Dims) -> Dims:
    """The sizes as they are. Raises ValueError for what ComfyUI would take for something else, or not at all."""
    if dims["hidden"] % HEAD:
        raise ValueError(Text("ComfyUI runs Wan with heads of {head} only, but the model is {width} wide", head=HEAD,
                              width=dims["hidden"]))
    if dims["out"] not in LATENTS:
        raise ValueError(Text("ComfyUI runs Wan with {known} output channels only, but the model has {channels}",
                              known=" / ".join(map(str, LATENTS)), channels=dims["out"]))
    if dims["image"] and dims["in"] not in WITH_IMAGE:
        raise ValueError(Text("ComfyUI runs a Wan with an image embedder on {known} input channels only, but the model "
                              "has {channels}", known=" / ".join(map(str, WITH_IMAGE)), channels=dims["in"]))
    return dims


WAN = Wan()

"""Qwen-Image, -Edit (2509, 2511) and -Layered: diffusers QwenImageTransformer2DModel <-> ComfyUI's QwenImage.

Both use the same names (diffusers' converter for it, in loaders/single_file_utils.py, is an identity). Edit-2511
differs by `zero_cond_t` in config.json alone. ComfyUI has no option for it and looks for an empty tensor instead
(comfy/model_detection.py), which a diffusers folder does not hold. Layered has a second embedding, by which ComfyUI
knows that references stand before the layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from .base import Dims, Entry, Inputs, Module, Naming, Size, config_int, count_blocks, expand, linear, norm, shape_of

HEAD = 128  # fixed in ComfyUI: head size, rotary axes, patches of 2x2, 16 channels out, MLP ratio 4
AXES = [16, 56, 56]
PATCH, CHANNELS_OUT = 2, 16
TEXT = 3584  # as it is in ComfyUI's code; its detection leaves it out
TIMESTEP_ZERO = "__index_timestep_zero__"  # what the host looks for: reference latents are conditioned on timestep 0
LAYERED = "time_text_embed.addition_t_embedding"  # of two rows, the second of which nothing asks for


def _same(sizes: Mapping[str, tuple[Size] | tuple[Size, Size]]) -> dict[str, Entry]:
    """Linear layers (rows, columns) and norms (size,) that have one name on both sides."""
    return {name: linear(name, size[0], size[1]) if len(size) == 2 else norm(name, size[0])
            for name, size in sizes.items()}


TOP = _same({
    "time_text_embed.timestep_embedder.linear_1": ("h", 256),
    "time_text_embed.timestep_embedder.linear_2": ("h", "h"),
    "txt_norm": ("text",),
    "img_in": ("h", "in"),
    "txt_in": ("h", "text"),
})
BLOCK = _same({
    "img_mod.1": ("6h", "h"),
    "img_mlp.net.0.proj": ("4h", "h"),
    "img_mlp.net.2": ("h", "4h"),
    "txt_mod.1": ("6h", "h"),
    "txt_mlp.net.0.proj": ("4h", "h"),
    "txt_mlp.net.2": ("h", "4h"),
    "attn.norm_q": (HEAD,),
    "attn.norm_k": (HEAD,),
    "attn.norm_added_q": (HEAD,),
    "attn.norm_added_k": (HEAD,),
    "attn.to_q": ("h", "h"),
    "attn.to_k": ("h", "h"),
    "attn.to_v": ("h", "h"),
    "attn.add_q_proj": ("h", "h"),
    "attn.add_k_proj": ("h", "h"),
    "attn.add_v_proj": ("h", "h"),
    "attn.to_out.0": ("h", "h"),
    "attn.to_add_out": ("h", "h"),
})
LAST = _same({"norm_out.linear": ("2h", "h"), "proj_out": ("out", "h")})

_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)transformer_blocks\.\d+\.txt_mod\.1\.weight$", re.MULTILINE)
# ControlNets, Nunchaku's SVDQuant, and Lens, whose MLP is gated.
_NOT_QWEN = ("controlnet_", "qkv_proj.", "to_qkv.", ".qweight", ".wscales", "img_mlp.w1.")


def _is_mage_flow(tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
    """Another model of the very names, which the host alone knows; told by two widths, as the host does."""
    text, out = (tensors.get(f"{prefix}{name}.weight") for name in ("txt_norm", "proj_out"))
    return text is not None and out is not None and text.shape[:1] == (2560,) and out.shape[:1] == (128,)


class QwenImage:
    """Qwen-Image, -Edit and -Layered. Dims: layers, hidden, in, out, text, layered and zero_cond_t (0 or 1).

    zero_cond_t is among the sizes from tensors only when the host's mark is stored; else a config or a base tells it.
    """

    name = "Qwen-Image"
    class_names = frozenset({"QwenImageTransformer2DModel"})
    config_only: frozenset[str] = frozenset({"zero_cond_t"})

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        found = _BLOCK.search(text)
        if found is None or any(mark in text for mark in _NOT_QWEN):
            return None
        if isinstance(names, Mapping) and _is_mage_flow(names, found["prefix"]):
            return None
        return Naming("native", found["prefix"]) if found["prefix"] else Naming("diffusers")

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        prefix = naming.prefix
        hidden, channels = shape_of(tensors, f"{prefix}img_in.weight")
        text, = shape_of(tensors, f"{prefix}txt_norm.weight", 1)
        out = shape_of(tensors, f"{prefix}proj_out.weight")[0]
        dims = {"layers": count_blocks(tensors, f"{prefix}transformer_blocks"), "hidden": hidden, "in": channels,
                "out": out, "text": text, "layered": int(f"{prefix}{LAYERED}.weight" in tensors)}
        if dims["layered"]:
            return {**dims, "zero_cond_t": 0}
        return {**dims, "zero_cond_t": 1} if f"{prefix}{TIMESTEP_ZERO}" in tensors else dims

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (QwenImageTransformer2DModel.__init__) for keys that a config leaves out
        variant = [key for key in ("use_additional_t_cond", "use_layer3d_rope", "zero_cond_t") if config.get(key)]
        if variant not in ([], ["zero_cond_t"], ["use_additional_t_cond", "use_layer3d_rope"]):
            raise ValueError(Text("ComfyUI runs Qwen-Image-Layered with use_additional_t_cond and use_layer3d_rope, "
                                  "and without zero_cond_t; config.json says {variant}", variant=", ".join(variant)))
        head, axes = config_int(config, "attention_head_dim", 128), list(config.get("axes_dims_rope") or AXES)
        patch, channels = config_int(config, "patch_size", 2), config_int(config, "in_channels", 64)
        out = channels if config.get("out_channels", 16) is None else config_int(config, "out_channels", 16)
        if (head, axes, patch, out) != (HEAD, AXES, PATCH, CHANNELS_OUT):
            raise ValueError(
                Text("ComfyUI runs Qwen-Image with heads of {head}, rotary axes {axes}, patch_size {patch} and "
                     "{channels} channels out only; config.json says {said_head}, {said_axes}, {said_patch} and "
                     "{said_channels}", head=HEAD, axes=AXES, patch=PATCH, channels=CHANNELS_OUT, said_head=head,
                     said_axes=axes, said_patch=patch, said_channels=out))
        return {
            "layers": config_int(config, "num_layers", 60),
            "hidden": head * config_int(config, "num_attention_heads", 24), "in": channels, "out": patch ** 2 * out,
            "text": config_int(config, "joint_attention_dim", TEXT),
            "layered": int(len(variant) == 2), "zero_cond_t": int("zero_cond_t" in variant),
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        if unet_config.get("image_model") != "qwen_image":
            return None
        # the host keeps the other sizes in its code, not in unet_config
        return {"layers": unet_config["num_layers"], "in": unet_config["in_channels"],
                "text": unet_config.get("joint_attention_dim", TEXT),
                "layered": int(bool(unet_config.get("use_additional_t_cond"))),
                "zero_cond_t": int(unet_config.get("default_ref_method") == "index_timestep_zero")}

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "h": dims["hidden"], **{f"{n}h": n * dims["hidden"] for n in (2, 4, 6)}}
        yield from expand(TOP, sizes, naming)
        if dims.get("layered"):
            yield Module(LAYERED, (naming.prefix + LAYERED,), (2,), (dims["hidden"],), False, kind="plain")
        for i in range(dims["layers"]):
            yield from expand(BLOCK, sizes, naming, f"transformer_blocks.{i}.", f"transformer_blocks.{i}.")
        yield from expand(LAST, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return (TIMESTEP_ZERO,) if dims.get("zero_cond_t") else ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((128, dims["text"]), patch=PATCH)  # a long prompt; nothing is padded


QWEN_IMAGE = QwenImage()

"""FLUX.1 (dev, schnell, Kontext, Fill, Canny, Depth, Krea): diffusers FluxTransformer2DModel ↔ ComfyUI's Flux.

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_flux_transformer_checkpoint_to_diffusers), read backwards. The host fuses q, k, v into one Linear, and q, k, v
and the MLP's first layer into linear1; the last modulation has shift and scale the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..headers import TensorInfo
from .base import Dims, Module, Naming

HEAD = 128  # fixed in ComfyUI: head size, rotary axes, MLP ratio 4, 256 timestep channels
AXES = [16, 56, 56]

# native module: (stored parts, their rows, columns). Sizes: h hidden, "3h" three times hidden, and the names of `dims`.
TOP = {
    "img_in": (("x_embedder",), ("h",), "in"),
    "txt_in": (("context_embedder",), ("h",), "text"),
    "time_in.in_layer": (("time_text_embed.timestep_embedder.linear_1",), ("h",), "256"),
    "time_in.out_layer": (("time_text_embed.timestep_embedder.linear_2",), ("h",), "h"),
    "vector_in.in_layer": (("time_text_embed.text_embedder.linear_1",), ("h",), "pooled"),
    "vector_in.out_layer": (("time_text_embed.text_embedder.linear_2",), ("h",), "h"),
}
GUIDANCE = {
    "guidance_in.in_layer": (("time_text_embed.guidance_embedder.linear_1",), ("h",), "256"),
    "guidance_in.out_layer": (("time_text_embed.guidance_embedder.linear_2",), ("h",), "h"),
}
DOUBLE = {
    "img_mod.lin": (("norm1.linear",), ("6h",), "h"),
    "txt_mod.lin": (("norm1_context.linear",), ("6h",), "h"),
    "img_attn.qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), ("h", "h", "h"), "h"),
    "txt_attn.qkv": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), ("h", "h", "h"), "h"),
    "img_attn.proj": (("attn.to_out.0",), ("h",), "h"),
    "txt_attn.proj": (("attn.to_add_out",), ("h",), "h"),
    "img_mlp.0": (("ff.net.0.proj",), ("4h",), "h"),
    "img_mlp.2": (("ff.net.2",), ("h",), "4h"),
    "txt_mlp.0": (("ff_context.net.0.proj",), ("4h",), "h"),
    "txt_mlp.2": (("ff_context.net.2",), ("h",), "4h"),
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": (("norm.linear",), ("3h",), "h"),
    "linear1": (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("h", "h", "h", "4h"), "h"),
    "linear2": (("proj_out",), ("h",), "5h"),
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
LAST = {
    "final_layer.adaLN_modulation.1": (("norm_out.linear",), ("2h",), "h"),
    "final_layer.linear": (("proj_out",), ("out",), "h"),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers: scale | shift, native: shift | scale

_DIFFUSERS_BLOCK = re.compile(r"^single_transformer_blocks\.\d+\.proj_mlp\.", re.MULTILINE)
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)double_blocks\.\d+\.img_mod\.lin\.", re.MULTILINE)
_NOT_FLUX1 = ("distilled_guidance_layer", "token_refiner", "individual_token_refiner", "double_stream_modulation_img",
              "controlnet_", "attn.qkv_proj", "qkv_proj.")


class Flux1:
    """FLUX.1. Dims: hidden, in, out, text, pooled, double, single, guidance (0 or 1)."""

    name = "FLUX.1"
    class_names = frozenset({"FluxTransformer2DModel"})

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if any(mark in text for mark in _NOT_FLUX1):
            return None
        if _DIFFUSERS_BLOCK.search(text):
            return Naming("diffusers")
        native = _NATIVE_BLOCK.search(text)
        return Naming("native", native["prefix"], "scale" if "_norm.scale" in text else "weight") if native else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers = naming.style == "diffusers"

        def shape(native: str) -> tuple[int, ...]:
            stored = {**TOP, **LAST}[native][0][0] if diffusers else f"{naming.prefix}{native}"
            info = tensors.get(f"{stored}.weight")
            if info is None or len(info.shape) != 2:
                raise ValueError(f"FLUX.1 needs a two-dimensional tensor {stored}.weight")
            return info.shape

        def blocks(kind: str) -> int:
            pattern = re.compile(re.escape(f"{naming.prefix}{kind}.") + r"(\d+)\.")
            return 1 + max((int(m[1]) for m in map(pattern.match, tensors) if m), default=-1)

        guidance = "time_text_embed.guidance_embedder." if diffusers else f"{naming.prefix}guidance_in."
        hidden, channels = shape("img_in")
        return {
            "hidden": hidden, "in": channels, "out": shape("final_layer.linear")[0],
            "text": shape("txt_in")[1], "pooled": shape("vector_in.in_layer")[1],
            "double": blocks("transformer_blocks" if diffusers else "double_blocks"),
            "single": blocks("single_transformer_blocks" if diffusers else "single_blocks"),
            "guidance": int(any(name.startswith(guidance) for name in tensors)),
        }

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (FluxTransformer2DModel.__init__) for keys that a config leaves out
        def get(key: str, default: int) -> int:
            value = config.get(key, default)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"config.json: {key} is {value!r}, expected a number")
            return value

        head, axes = get("attention_head_dim", 128), list(config.get("axes_dims_rope") or AXES)
        if head != HEAD or axes != AXES or get("patch_size", 1) != 1:
            raise ValueError(
                f"ComfyUI runs FLUX.1 with heads of {HEAD} and rotary axes {AXES}, patch_size 1 only; config.json says "
                f"{head}, {axes} and {config.get('patch_size', 1)}")
        channels = get("in_channels", 64)
        return {
            "hidden": head * get("num_attention_heads", 24), "in": channels,
            "out": get("out_channels", channels) if config.get("out_channels") is not None else channels,
            "text": get("joint_attention_dim", 4096), "pooled": get("pooled_projection_dim", 768),
            "double": get("num_layers", 19), "single": get("num_single_layers", 38),
            "guidance": int(bool(config.get("guidance_embeds", False))),
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        if unet_config.get("image_model") != "flux":
            return None
        patch = unet_config["patch_size"] ** 2
        return {
            "hidden": unet_config["hidden_size"], "in": unet_config["in_channels"] * patch,
            "out": unet_config["out_channels"] * patch, "text": unet_config["context_in_dim"],
            "pooled": unet_config["vec_in_dim"], "double": unet_config["depth"],
            "single": unet_config["depth_single_blocks"], "guidance": int(unet_config["guidance_embed"]),
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        h = dims["hidden"]
        sizes = {"256": 256, "in": dims["in"], "out": dims["out"], "text": dims["text"], "pooled": dims["pooled"],
                 "h": h, **{f"{n}h": n * h for n in range(2, 7)}}
        diffusers = naming.style == "diffusers"

        def linears(table: dict, native: str = "", stored: str = "") -> Iterator[Module]:
            for name, (parts, rows, columns) in table.items():
                each = tuple(sizes[r] for r in rows)
                if diffusers:
                    yield Module(native + name, tuple(stored + part for part in parts), each, sizes[columns],
                                 swap_halves=name == SWAPPED)
                else:
                    yield Module(native + name, (naming.prefix + native + name,), (sum(each),), sizes[columns])

        def norms(table: dict, native: str, stored: str) -> Iterator[Module]:
            for name, part in table.items():
                name_in_file = stored + part if diffusers else naming.prefix + native + name
                yield Module(native + name, (name_in_file,), (HEAD,), 0, bias=False, leaf="scale",
                             stored_leaf=naming.norm)

        yield from linears({**TOP, **GUIDANCE} if dims["guidance"] else TOP)
        for i in range(dims["double"]):
            yield from linears(DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
            yield from norms(DOUBLE_NORMS, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
        for i in range(dims["single"]):
            yield from linears(SINGLE, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
            yield from norms(SINGLE_NORMS, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
        yield from linears(LAST)


FLUX1 = Flux1()

"""Z-Image (Turbo, base, Omni): diffusers ZImageTransformer2DModel <-> ComfyUI's Lumina2 / NextDiT.

The map is that of diffusers' own converter (diffusers/loaders/single_file_utils.py,
convert_z_image_transformer_checkpoint_to_diffusers), read backwards. The host fuses q, k and v into one Linear.
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
    count_blocks,
    expand,
    fused,
    linear,
    norm,
    parameter,
    shape_of,
)

# Fixed in ComfyUI (comfy/model_detection.py and ldm/lumina/model.py), by the names of diffusers' config.
FIXED = {"all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "n_refiner_layers": 2,
         "norm_eps": 1e-5, "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48]}
PATCH, REFINERS, HEAD = 2, 2, 128
MODULATION, TIMESTEP = 256, 1024  # widths of the timestep's embedding and of its MLP

EMBEDDERS = {
    "x_embedder": linear("all_x_embedder.2-1", "h", "in"),
    "t_embedder.mlp.0": linear("t_embedder.mlp.0", TIMESTEP, 256),
    "t_embedder.mlp.2": linear("t_embedder.mlp.2", MODULATION, TIMESTEP),
    "cap_embedder.0": norm("cap_embedder.0", "text"),
    "cap_embedder.1": linear("cap_embedder.1", "h", "text"),
}
BLOCK = {
    "attention.qkv": fused(("attention.to_q", "attention.to_k", "attention.to_v"), ("h", "h", "h"), "h", bias=False),
    "attention.out": linear("attention.to_out.0", "h", "h", bias=False),
    "attention.q_norm": norm("attention.norm_q", HEAD),
    "attention.k_norm": norm("attention.norm_k", HEAD),
    **{f"feed_forward.{w}": linear(f"feed_forward.{w}", *size, bias=False)
       for w, size in (("w1", ("ffn", "h")), ("w2", ("h", "ffn")), ("w3", ("ffn", "h")))},
    **{name: norm(name, "h") for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")},
}
MODULATED = {**BLOCK, "adaLN_modulation.0": linear("adaLN_modulation.0", "4h", MODULATION)}
LAST = {
    "final_layer.linear": linear("all_final_layer.2-1.linear", "in", "h"),
    "final_layer.adaLN_modulation.1": linear("all_final_layer.2-1.adaLN_modulation.1", "h", MODULATION),
}
PADS = ("x_pad_token", "cap_pad_token")  # bare parameters, in no module
SIGLIP = {  # of Omni: what sees the pictures that it is given, with a refiner and a pad token of its own
    "siglip_embedder.0": norm("siglip_embedder.0", "siglip"),
    "siglip_embedder.1": linear("siglip_embedder.1", "h", "siglip"),
}

_DIFFUSERS_BLOCK = re.compile(r"^noise_refiner\.\d+\.attention\.to_q\.weight$", re.MULTILINE)
_NATIVE_BLOCK = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)noise_refiner\.\d+\.attention\.qkv\.weight$",
                           re.MULTILINE)
# Pixel space, NewBie, ControlNets, Nunchaku's SVDQuant. Lumina 2 and others of its family have no pad tokens.
_NOT_Z_IMAGE = ("dec_net.", "clip_text_pooled_proj.", "control", "to_qkv.", "qkv_proj.", ".qweight", ".wscales")


class ZImage:
    """Z-Image. Dims: layers, hidden, in (which is also out), text, siglip (0 in all but Omni)."""

    name = "Z-Image"
    class_names = frozenset({"ZImageTransformer2DModel"})
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        text = "\n".join(names)  # one scan in C for each mark, instead of one a name
        if "cap_pad_token" not in text or any(mark in text for mark in _NOT_Z_IMAGE):
            return None
        if _DIFFUSERS_BLOCK.search(text):
            return Naming("diffusers")
        native = _NATIVE_BLOCK.search(text)
        return Naming("native", native["prefix"]) if native else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        x_embedder = "all_x_embedder.2-1" if naming.style == "diffusers" else "x_embedder"
        hidden, channels = shape_of(tensors, f"{naming.prefix}{x_embedder}.weight")
        text, = shape_of(tensors, f"{naming.prefix}cap_embedder.0.weight", 1)
        siglip = f"{naming.prefix}siglip_embedder.0.weight"
        omni = any(name.startswith(f"{naming.prefix}siglip_") for name in tensors)
        return {"layers": count_blocks(tensors, f"{naming.prefix}layers"), "hidden": hidden, "in": channels,
                "text": text, "siglip": shape_of(tensors, siglip, 1)[0] if omni else 0}

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        # diffusers' defaults (ZImageTransformer2DModel.__init__) for keys that a config leaves out
        differs = [f"{key} {config[key]} (ComfyUI: {value})" for key, value in FIXED.items()
                   if key in config and config[key] != value]
        hidden, heads = config_int(config, "dim", 3840), config_int(config, "n_heads", 30)
        if hidden != heads * HEAD or config_int(config, "n_kv_heads", 30) != heads:
            differs.append(Text("dim {hidden} in {heads} heads and {kv_heads} for keys and values (ComfyUI: heads of "
                                "{head}, as many for keys and values)", hidden=hidden, heads=heads,
                                kv_heads=config.get("n_kv_heads", 30), head=HEAD))
        if differs:
            raise ValueError(Text("ComfyUI does not run a Z-Image like this one; config.json says {differs}",
                                  differs=joined(", ", differs)))
        return {"layers": config_int(config, "n_layers", 30), "hidden": hidden,
                "in": PATCH ** 2 * config_int(config, "in_channels", 16),
                "text": config_int(config, "cap_feat_dim", 2560), "siglip": config_int(config, "siglip_feat_dim", 0)}

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        # its relatives share the host's class: Lumina 2 is modulated otherwise
        ours = unet_config.get("image_model") == "lumina2" and unet_config.get("z_image_modulation")
        if not ours or not unet_config.get("pad_tokens_multiple"):
            return None
        return {"layers": unet_config["n_layers"], "hidden": unet_config["dim"],
                "in": unet_config["in_channels"] * unet_config["patch_size"] ** 2, "text": unet_config["cap_feat_dim"],
                "siglip": unet_config.get("siglip_feat_dim") or 0}

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        hidden = dims["hidden"]
        sizes = {**dims, "h": hidden, "4h": 4 * hidden, "ffn": hidden * 8 // 3}
        yield from expand(EMBEDDERS, sizes, naming)
        omni = bool(dims.get("siglip"))
        for stack, count, block in (("noise_refiner", REFINERS, MODULATED), ("context_refiner", REFINERS, BLOCK),
                                    ("layers", dims["layers"], MODULATED), ("siglip_refiner", omni * REFINERS, BLOCK)):
            for i in range(count):
                yield from expand(block, sizes, naming, f"{stack}.{i}.", f"{stack}.{i}.")
        yield from expand(SIGLIP if omni else {}, sizes, naming)
        yield from expand(LAST, sizes, naming)
        for pad in (*PADS, "siglip_pad_token") if omni else PADS:
            yield from expand({"": parameter(pad, pad, 1, "h")}, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        return Inputs((128, dims["text"]), patch=PATCH)  # a long prompt; nothing is padded


Z_IMAGE = ZImage()

"""diffusers AutoencoderKLLTXVideo (0.9.0 to 0.9.8) and AutoencoderKLLTX2Video: one network of ComfyUI's, which takes
the list of its blocks from a file's metadata. Here it is made of config.json, with the names of the blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from .base import Latents, Plan, VAEClass

if TYPE_CHECKING:
    import torch

LATENT, SPATIAL, TEMPORAL = 128, 32, 8
# What a block of diffusers' kind makes smaller or larger, in ComfyUI's words
_STRIDES = {"spatial": "space", "temporal": "time", "spatiotemporal": "all"}
_SPACE, _TIME = ("spatial", "spatiotemporal"), ("temporal", "spatiotemporal")
_REST = {"decoder.time_embedder.": "decoder.last_time_embedder.",
         "decoder.scale_shift_table": "decoder.last_scale_shift_table",
         "latents_mean": "per_channel_statistics.mean-of-means", "latents_std": "per_channel_statistics.std-of-means"}
_WIDENING = {"conv_shortcut.conv.": "conv_shortcut.", "norm3.": "norm3.norm."}  # in a block that changes the width
# Of each class, by decoder: the defaults of diffusers
LTX: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": [128, 256, 512, 512],
    "layers_per_block": [4, 3, 3, 3, 4], "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False], "decoder_spatio_temporal_scaling": [True, True, True, False],
    "decoder_inject_noise": [False] * 5, "downsample_type": ["conv"] * 4, "upsample_type": ["spatiotemporal"] * 4,
    "upsample_residual": [False] * 4, "upsample_factor": [1] * 4, "timestep_conditioning": False, "patch_size": 4,
    "decoder_causal": False, "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "zeros",
    "down_block_types": ["LTXVideoDownBlock3D"] * 4}
LTX2: dict[str, Any] = {
    **LTX, "block_out_channels": [256, 512, 1024, 2048], "decoder_block_out_channels": [256, 512, 1024],
    "layers_per_block": [4, 6, 6, 2, 2], "decoder_layers_per_block": [5] * 4, "spatio_temporal_scaling": [True] * 4,
    "decoder_spatio_temporal_scaling": [True] * 3, "decoder_inject_noise": [False] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "upsample_type": ["spatiotemporal"] * 3, "upsample_residual": [True] * 3, "upsample_factor": [2] * 3,
    "decoder_causal": True, "decoder_spatial_padding_mode": "reflect", "down_block_types": ["LTX2VideoDownBlock3D"] * 4}


class _Half:
    """One half of the network: ComfyUI's blocks in order, their names for diffusers', and what they scale by."""

    def __init__(self, half: str, blocks: str) -> None:
        self.half, self.list = half, blocks
        self.blocks: list[tuple[str, dict[str, Any]]] = []
        self.names: dict[str, str] = {}
        self.widening: list[str] = []
        self.space = self.time = 1

    def add(self, stored: str, kind: str, **given: Any) -> None:
        """The next block; `stored` is the beginning of diffusers' names for it, without the half."""
        native = f"{self.half}.{self.list}.{len(self.blocks)}."
        self.blocks.append((kind, given))
        if kind == "res_x":
            self.names[f"{self.half}.{stored}.resnets."] = f"{native}res_blocks."
            self.names[f"{self.half}.{stored}.time_embedder."] = f"{native}time_embedder."
        else:
            self.names[f"{self.half}.{stored}."] = native
        if kind == "res_x_y":
            self.widening.append(native)

    def scale(self, kind: str) -> None:
        self.space *= 2 if kind in _SPACE else 1
        self.time *= 2 if kind in _TIME else 1


def _times(wide: int, narrow: int) -> int:
    """How many times as wide. Raises ValueError where that is no whole number."""
    if narrow < 1 or wide % narrow:
        raise ValueError(Text("config.json: a width of {wide} beside one of {narrow}; ComfyUI has multiples only",
                              wide=wide, narrow=narrow))
    return wide // narrow


def _encoder(config: Mapping[str, Any], second: bool) -> tuple[_Half, int]:
    """The encoder and its first width. Before 0.9.5 a block makes the picture smaller by a plain convolution, and
    behind that, as a block of its own, wider."""
    half, widths = _Half("encoder", "down_blocks"), list(config["block_out_channels"])
    later = config["down_block_types"][-1] != "LTXVideoDownBlock3D"
    first = LATENT if second else widths[0]
    after = widths if second else widths[1:] if later else [*widths[1:], widths[-1]]
    width = first
    for number, out in enumerate(after):
        here = f"down_blocks.{number}"
        half.add(here, "res_x", num_layers=config["layers_per_block"][number])
        kind = config["downsample_type"][number] if later else "conv"
        if config["spatio_temporal_scaling"][number]:
            if kind == "conv":
                half.add(f"{here}.downsamplers.0", "compress_all")
            else:
                half.add(f"{here}.downsamplers.0", f"compress_{_STRIDES[kind]}_res", multiplier=_times(out, width))
            half.scale("spatiotemporal" if kind == "conv" else kind)
        if out != width and (kind == "conv" or not config["spatio_temporal_scaling"][number]):
            half.add(f"{here}.conv_out", "res_x_y", multiplier=_times(out, width))
        width = out
    half.add("mid_block", "res_x", num_layers=config["layers_per_block"][-1])
    return half, first


def _decoder(config: Mapping[str, Any]) -> tuple[_Half, int]:
    """The decoder, from the latent on, and its last width."""
    def back(name: str) -> list[Any]:
        return list(reversed(config[name]))

    half = _Half("decoder", "up_blocks")
    widths, layers, noise = back("decoder_block_out_channels"), back("decoder_layers_per_block"), \
        back("decoder_inject_noise")
    timed, width = bool(config["timestep_conditioning"]), widths[0]
    half.add("mid_block", "res_x", num_layers=layers[0], inject_noise=noise[0])
    parts = zip(widths, back("upsample_factor"), back("decoder_spatio_temporal_scaling"), back("upsample_residual"),
                config["upsample_type"], strict=False)
    for number, (block, factor, scales, residual, kind) in enumerate(parts):
        here, before, width = f"up_blocks.{number}", _times(width, factor), _times(block, factor)
        if before != width:
            if timed or factor != 1:
                raise ValueError(Text("config.json: a block of the decoder changes the width by itself, which ComfyUI "
                                      "does not have with timestep_conditioning or upsample_factor"))
            half.add(f"{here}.conv_in", "res_x_y", multiplier=_times(before, width), inject_noise=noise[number + 1])
        if scales:
            if residual and kind != "spatiotemporal":
                raise ValueError(Text("config.json: upsample_residual with upsample_type {kind}, which ComfyUI does "
                                      "not have", kind=kind))
            half.add(f"{here}.upsamplers.0", f"compress_{_STRIDES[kind]}", multiplier=factor,
                     **({"residual": bool(residual)} if kind == "spatiotemporal" else {}))
            half.scale(kind)
        half.add(here, "res_x", num_layers=layers[number + 1], inject_noise=noise[number + 1])
    return half, width


def _rename(names: Mapping[str, str], widening: tuple[str, ...],
            tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def native(name: str) -> str:
        old = max((prefix for prefix in names if name.startswith(prefix)), key=len, default="")
        new = names.get(old, "") + name.removeprefix(old)
        if new.startswith(widening):
            for leaf, other in _WIDENING.items():
                new = new.replace(leaf, other)
        return new

    return {native(name): tensor for name, tensor in tensors.items()}


def _full(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with diffusers' defaults, and one value for each block where it has one for all."""
    full = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    counts = {"spatio_temporal_scaling": len(full["layers_per_block"]) - 1,
              **dict.fromkeys(("decoder_spatio_temporal_scaling", "upsample_residual"),
                              len(full["decoder_layers_per_block"]) - 1),
              "decoder_inject_noise": len(full["decoder_layers_per_block"])}
    for key, count in counts.items():
        if isinstance(full[key], bool):
            full[key] = [full[key]] * count
    return full


def _plan(config: Mapping[str, Any], second: bool) -> Plan:
    full = _full(config, LTX2 if second else LTX)
    try:
        encoder, first = _encoder(full, second)
        decoder, last = _decoder(full)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(Text("config.json does not describe the blocks of this VAE: {error!r}",
                              error=error)) from error
    patch = full["patch_size"]
    ratios = {(half.space * patch, half.time) for half in (encoder, decoder)}
    if ratios != {(SPATIAL, TEMPORAL)}:
        raise ValueError(Text("config.json: a latent is 1/{space} of the picture and 1/{time} of the frames; ComfyUI "
                              "has {needed_space} and {needed_time}", space=encoder.space * patch, time=encoder.time,
                              needed_space=SPATIAL, needed_time=TEMPORAL))
    padding = (full["encoder_spatial_padding_mode"], full["decoder_spatial_padding_mode"])
    if padding not in (("zeros", "reflect"), (padding[0], padding[0])):
        raise ValueError(Text("config.json: the halves are padded by {first} and {second}; ComfyUI has zeros and "
                              "reflect, or one for both", first=padding[0], second=padding[1]))
    made: dict[str, Any] = {
        "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
        "latent_channels": LATENT, "norm_layer": "pixel_norm", "latent_log_var": "uniform", "patch_size": patch,
        "causal_decoder": bool(full["decoder_causal"]), "timestep_conditioning": bool(full["timestep_conditioning"]),
        "encoder_blocks": encoder.blocks, "decoder_blocks": decoder.blocks[::-1], "encoder_base_channels": first,
        "decoder_base_channels": last, **({"spatial_padding_mode": padding[0]} if len(set(padding)) == 1 else {})}
    notes = (Text("this VAE decodes with noise: ComfyUI has a share of 0.025 and time 0.05, diffusers' pipelines none "
                  "unless they are told"),) if made["timestep_conditioning"] else ()
    sizes = {"config": made}
    return Plan("LTX-2" if second else "LTX-Video", "ltxv", sizes, sizes, True, "LTXV", LATENT,
                Latents((1.0,), (0.0,)),
                partial(_rename, {**encoder.names, **decoder.names, **_REST}, (*encoder.widening, *decoder.widening)),
                Text("widths {encoder}, decoder {decoder}", encoder=list(full["block_out_channels"]),
                     decoder=list(full["decoder_block_out_channels"])),
                notes, metadata={"config": json.dumps({"vae": made})})


_FIXED = {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "patch_size_t": 1, "resnet_norm_eps": 1e-6,
          "scaling_factor": 1.0, "encoder_causal": True}
_WITHOUT_EFFECT = frozenset({"spatial_compression_ratio", "temporal_compression_ratio"})
LTX_VIDEO = VAEClass("AutoencoderKLLTXVideo", {
    **_FIXED, "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "zeros",
    "upsample_type": "none"},
    frozenset(LTX), _WITHOUT_EFFECT, partial(_plan, second=False))
LTX2_VIDEO = VAEClass("AutoencoderKLLTX2Video", _FIXED, frozenset(LTX2), _WITHOUT_EFFECT, partial(_plan, second=True))

"""diffusers AutoencoderKLWan: Wan 2.1 (and 2.2 A14B), and the residual one of Wan 2.2 TI2V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from ...architectures.base import check_fixed
from .base import Native, Plan, VAEClass, normalised, whole

if TYPE_CHECKING:
    import torch

# Fixed in both of ComfyUI's networks (comfy/sd.py), under the names of both sides.
SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
FIXED = {**SHAPE, "scale_factor_temporal": 4}
WITHOUT_EFFECT = frozenset({"dropout", "clip_output"})  # diffusers clamps to -1..1 in any case, as ComfyUI does
WIDTH, LATENT = 96, 16
RESIDUAL = {"dim": 160, "dec_dim": 256, "z_dim": 48}  # Wan 2.2 TI2V's, the only ones ComfyUI's constructor makes
_RESNET = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
           "conv_shortcut": "shortcut"}
_SAMPLER = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}


def module_names(residual: bool) -> dict[str, str]:
    """diffusers module name -> native name, for all modules that hold tensors."""
    table = {"quant_conv": "conv1", "post_quant_conv": "conv2"}

    def block(stored: str, native: str, leaves: Mapping[str, str] = _RESNET) -> None:
        table.update({f"{stored}.{a}": f"{native}.{b}" for a, b in leaves.items()})

    for half in ("encoder", "decoder"):
        block(half, half, {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"})
        block(f"{half}.mid_block.resnets.0", f"{half}.middle.0")
        block(f"{half}.mid_block.attentions.0", f"{half}.middle.1", _ATTENTION)
        block(f"{half}.mid_block.resnets.1", f"{half}.middle.2")
    for i in range(4):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        to_down, to_up = f"encoder.downsamples.{i}.downsamples", f"decoder.upsamples.{i}.upsamples"
        for j in range(3):  # the third of the encoder resamples; the decoder has one more before it does
            n = 3 * i + j
            stored, native = (f"{down}.resnets.{j}", f"{to_down}.{j}") if residual else \
                (f"encoder.down_blocks.{n}", f"encoder.downsamples.{n}")
            if j < 2:
                block(stored, native)
            else:
                block(f"{down}.downsampler" if residual else stored, native, _SAMPLER)
            block(f"{up}.resnets.{j}", f"{to_up}.{j}" if residual else f"decoder.upsamples.{4 * i + j}")
        block(f"{up}.upsampler" if residual else f"{up}.upsamplers.0",
              f"{to_up}.3" if residual else f"decoder.upsamples.{4 * i + 3}", _SAMPLER)
    return table


def native_names(residual: bool) -> Native:
    """The function that renames stored tensors; one it does not know keeps its name."""
    table = module_names(residual)

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def native(name: str) -> str:
            module, _, leaf = name.rpartition(".")
            return f"{table.get(module, module)}.{leaf}"
        return {native(name): tensor for name, tensor in tensors.items()}

    return rename


def plain(config: Mapping[str, Any], family: str, channels_in: str, channels_out: str) -> Plan:
    """The non-residual network, whose width ComfyUI reads from the tensors."""
    width, decoder = whole(config, "base_dim", WIDTH), config.get("decoder_base_dim")
    if decoder not in (None, width):
        raise ValueError(Text("config.json: decoder_base_dim is {decoder}, base_dim {width}; ComfyUI has one for both",
                              decoder=decoder, width=width))
    sizes = {"dim": width, "z_dim": LATENT, "image_channels": whole(config, channels_in, 3),
             "conv_out_channels": whole(config, channels_out, 3), **SHAPE}
    return Plan(family, "wan21", sizes, sizes, True, "Wan21", LATENT, normalised(config, LATENT), native_names(False),
                Text("width {width}", width=width))


def _plan(config: Mapping[str, Any]) -> Plan:
    residual = bool(config.get("is_residual"))
    only = {"z_dim": RESIDUAL["z_dim"], "in_channels": 12, "out_channels": 12, "patch_size": 2,
            "scale_factor_spatial": 16} if residual else {"z_dim": LATENT, "patch_size": 1, "scale_factor_spatial": 8}
    check_fixed(config, only, Text("AutoencoderKLWan with is_residual {residual}", residual=residual))
    if not residual:
        return plain(config, "Wan 2.1, Wan 2.2 A14B", "in_channels", "out_channels")
    latents = normalised(config, RESIDUAL["z_dim"])
    if latents is None:  # diffusers' default is Wan 2.1's sixteen
        raise ValueError(Text("config.json has no latents_mean and latents_std"))
    width = whole(config, "base_dim", WIDTH)
    own = {**RESIDUAL, "dim": width, "dec_dim": whole(config, "decoder_base_dim", width)}
    return Plan("Wan 2.2 TI2V", "wan22", {**own, **SHAPE}, {**RESIDUAL, **SHAPE}, own == RESIDUAL, "Wan22",
                RESIDUAL["z_dim"], latents, native_names(True),
                Text("width {width}, decoder {decoder}", width=width, decoder=own["dec_dim"]))


WAN = VAEClass(
    "AutoencoderKLWan", FIXED,
    frozenset({"base_dim", "decoder_base_dim", "z_dim", "latents_mean", "latents_std", "is_residual", "in_channels",
               "out_channels", "patch_size", "scale_factor_spatial"}), WITHOUT_EFFECT, _plan)

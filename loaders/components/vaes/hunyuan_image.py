"""diffusers AutoencoderKLHunyuanImage (2.1): pixels go into channels and come out of them, 1/32 of width and height."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ....host.texts import Text
from .base import GROUPS, Plan, VAEClass, scaled

if TYPE_CHECKING:
    import torch

LATENT, SPATIAL = 64, 32
WIDTHS = [128, 256, 512, 512, 1024, 1024]
# Of a middle block: diffusers' name of a module -> ComfyUI's
MIDDLE = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0.norm": "attn_1.norm",
          "attentions.0.to_q": "attn_1.q", "attentions.0.to_k": "attn_1.k", "attentions.0.to_v": "attn_1.v",
          "attentions.0.proj": "attn_1.proj_out", "attentions.0.proj_out": "attn_1.proj_out"}


def widths_of(config: Mapping[str, Any], published: list[int], latent: int, groups: int = 1) -> list[int]:
    """The widths of the levels, of which there are as many as published ones. Raises ValueError for what the network
    cannot have."""
    value = config.get("block_out_channels") or published
    if not isinstance(value, list) or len(value) != len(published) or not all(
            isinstance(n, int) and n > 0 and not n % groups for n in value) or value[-1] % (2 * latent):
        raise ValueError(Text("config.json: block_out_channels is {value!r}; ComfyUI's network has {count} levels, the "
                              "last a multiple of {last}", value=value, count=len(published), last=2 * latent))
    return value


def middles(table: dict[str, str]) -> dict[str, str]:
    """`table` with the middle blocks of both halves: beginnings of names -> ComfyUI's."""
    return table | {f"{half}.mid_block.{old}.": f"{half}.mid.{new}." for half in ("encoder", "decoder")
                    for old, new in MIDDLE.items()}


def renamed(table: Mapping[str, str], leaves: Mapping[str, str],
            tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by ComfyUI's names: `table` has the beginnings of names, `leaves` what else is called otherwise."""
    def native(name: str) -> str:
        old = max((prefix for prefix in table if name.startswith(prefix)), key=len, default="")
        rest = name.removeprefix(old)
        for leaf, other in leaves.items():
            rest = rest.replace(leaf, other)
        return table.get(old, "") + rest

    return {native(name): tensor for name, tensor in tensors.items()}


def names(levels: int, layers: int) -> dict[str, str]:
    """Beginnings of diffusers' names, in which a level is no more than its place in a row -> ComfyUI's."""
    table: dict[str, str] = {}
    for half, row, blocks, resampler in (("encoder", "down", layers, "downsample"),
                                         ("decoder", "up", layers + 1, "upsample")):
        place = 0
        for level in range(levels):
            for block in range(blocks):
                table[f"{half}.{row}_blocks.{place + block}."] = f"{half}.{row}.{level}.block.{block}."
            table[f"{half}.{row}_blocks.{place + blocks}."] = f"{half}.{row}.{level}.{resampler}."
            place += blocks + 1
    return middles(table)


def _plan(config: Mapping[str, Any]) -> Plan:
    widths = widths_of(config, WIDTHS, LATENT, GROUPS)
    sizes: dict[str, Any] = {
        "z_channels": LATENT, "in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "ffactor_spatial": SPATIAL,
        "downsample_match_channel": True, "upsample_match_channel": True}
    return Plan("HunyuanImage 2.1", "hunyuan_image", {**sizes, "block_out_channels": widths},
                {**sizes, "block_out_channels": WIDTHS}, widths == WIDTHS, "HunyuanImage21", LATENT,
                scaled(config, 1.0), partial(renamed, names(len(WIDTHS), 2), {"conv_shortcut.": "nin_shortcut."}),
                Text("widths {widths}", widths=widths))


HUNYUAN_IMAGE = VAEClass(
    "AutoencoderKLHunyuanImage",
    {"in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "layers_per_block": 2,
     "spatial_compression_ratio": SPATIAL, "downsample_match_channel": True, "upsample_match_channel": True},
    frozenset({"block_out_channels", "scaling_factor"}), frozenset({"sample_size"}), _plan)

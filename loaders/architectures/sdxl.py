"""SDXL (base, Turbo, and what was trained from them): diffusers UNet2DConditionModel <-> ComfyUI's UNetModel.

The host calls the blocks what the original code calls them (input_blocks, middle_block, output_blocks). The names here
are those of its own map (comfy/utils.py, unet_to_diffusers), the sizes those of
comfy/ldm/modules/diffusionmodules/openaimodel.py; both are held against it by
tests/families/nunchaku/test_svdquant_sdxl.py. The host tells UNets apart by exact sizes (comfy/supported_models.py), so
all others are refused here.

Only Nunchaku's files, and what the host saves of such a MODEL, are read by this table; native ones are the host's own
model (passthrough.py), and other UNets in diffusers' names are translated by the host's own map (classes/unet.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ...host.texts import Text
from ..containers.safetensors import TensorInfo
from .base import (
    Dims,
    Entry,
    Inputs,
    Module,
    Naming,
    check_fixed,
    config_int,
    conv,
    count_blocks,
    expand,
    linear,
    norm,
    shape_of,
)

HEAD = 64  # fixed in ComfyUI for every UNet of this kind
LEVELS = (1, 2, 4)  # widths of the levels, in those of the first
SIZE_EMBEDDING = 256  # of each of six numbers: height, width, crop and target
RESNETS = 2  # of a level on the way down; one more on the way up
SIZES = {"hidden": 320, "in": 4, "out": 4, "text": 2048, "vector": 2816, "middle": 2, "deep": 10}  # of all SDXL models

FIRST = {
    "time_embed.0": linear("time_embedding.linear_1", "time", "hidden"),
    "time_embed.2": linear("time_embedding.linear_2", "time", "time"),
    "label_emb.0.0": linear("add_embedding.linear_1", "time", "vector"),
    "label_emb.0.2": linear("add_embedding.linear_2", "time", "time"),
    "input_blocks.0.0": conv("conv_in", "hidden", "in", 3, 3),
}
LAST = {
    "out.0": norm("conv_norm_out", "hidden", bias=True),
    "out.2": conv("conv_out", "out", "hidden", 3, 3),
}
RESNET = {
    "in_layers.0": norm("norm1", "columns", bias=True),
    "in_layers.2": conv("conv1", "rows", "columns", 3, 3),
    "emb_layers.1": linear("time_emb_proj", "rows", "time"),
    "out_layers.0": norm("norm2", "rows", bias=True),
    "out_layers.3": conv("conv2", "rows", "rows", 3, 3),
}
SHORTCUT = {"skip_connection": conv("conv_shortcut", "rows", "columns", 1, 1)}
TRANSFORMER = {
    "norm": norm("norm", "rows", bias=True),
    "proj_in": linear("proj_in", "rows", "rows"),
    "proj_out": linear("proj_out", "rows", "rows"),
}
BLOCK = {  # one name on both sides
    "norm1": norm("norm1", "rows", bias=True),
    "attn1.to_q": linear("attn1.to_q", "rows", "rows", bias=False),
    "attn1.to_k": linear("attn1.to_k", "rows", "rows", bias=False),
    "attn1.to_v": linear("attn1.to_v", "rows", "rows", bias=False),
    "attn1.to_out.0": linear("attn1.to_out.0", "rows", "rows"),
    "norm2": norm("norm2", "rows", bias=True),
    "attn2.to_q": linear("attn2.to_q", "rows", "rows", bias=False),
    "attn2.to_k": linear("attn2.to_k", "rows", "text", bias=False),
    "attn2.to_v": linear("attn2.to_v", "rows", "text", bias=False),
    "attn2.to_out.0": linear("attn2.to_out.0", "rows", "rows"),
    "norm3": norm("norm3", "rows", bias=True),
    "ff.net.0.proj": linear("ff.net.0.proj", "8rows", "rows"),  # values and gate, in this order on both sides
    "ff.net.2": linear("ff.net.2", "rows", "4rows"),
}
DOWN = {"op": conv("conv", "rows", "columns", 3, 3)}
UP = {"conv": conv("conv", "rows", "columns", 3, 3)}

# What config.json must say where it says anything: the host has this in its code.
FIXED = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": RESNETS, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_EMBEDDING, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu",
    "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "resnet_time_scale_shift": "default",
}

_SAVED = re.compile(r"^(?P<prefix>model\.diffusion_model\.|)input_blocks\.\d+\.1\.transformer_blocks\.\d+\.attn1\."
                    r"to_q\.(weight_down_0|weight_t0_down)$", re.MULTILINE)


class Unit(NamedTuple):
    """A part of the UNet, `columns` channels in and `rows` out; a transformer has `depth` blocks."""

    native: str
    stored: str
    table: Mapping[str, Entry]
    columns: int
    rows: int
    depth: int = 0


def units(dims: Dims) -> Iterator[Unit]:
    """All parts between the first and the last convolution, in the order in which they run."""
    widths, depths = [size * dims["hidden"] for size in LEVELS], (0, dims["middle"], dims["deep"])
    width, kept, n = widths[0], [widths[0]], 1  # kept: the widths that the way up takes beside its own
    last = len(LEVELS) - 1

    def resnet(native: str, stored: str, columns: int, rows: int) -> Unit:
        return Unit(native, stored, RESNET if columns == rows else {**RESNET, **SHORTCUT}, columns, rows)

    for level, (rows, depth) in enumerate(zip(widths, depths, strict=True)):
        block = f"down_blocks.{level}"
        for i in range(RESNETS):
            yield resnet(f"input_blocks.{n}.0", f"{block}.resnets.{i}", width, rows)
            if depth:
                yield Unit(f"input_blocks.{n}.1", f"{block}.attentions.{i}", TRANSFORMER, rows, rows, depth)
            width, n = rows, n + 1
            kept.append(width)
        if level < last:
            yield Unit(f"input_blocks.{n}.0", f"{block}.downsamplers.0", DOWN, width, width)
            kept.append(width)
            n += 1
    yield resnet("middle_block.0", "mid_block.resnets.0", width, width)
    yield Unit("middle_block.1", "mid_block.attentions.0", TRANSFORMER, width, width, depths[last])
    yield resnet("middle_block.2", "mid_block.resnets.1", width, width)
    n = 0
    for level in reversed(range(len(LEVELS))):
        block, rows, depth = f"up_blocks.{last - level}", widths[level], depths[level]
        for i in range(RESNETS + 1):
            yield resnet(f"output_blocks.{n}.0", f"{block}.resnets.{i}", width + kept.pop(), rows)
            if depth:
                yield Unit(f"output_blocks.{n}.1", f"{block}.attentions.{i}", TRANSFORMER, rows, rows, depth)
            width, n = rows, n + 1
        if level:
            yield Unit(f"output_blocks.{n - 1}.{2 if depth else 1}", f"{block}.upsamplers.0", UP, width, width)


class Sdxl:
    """SDXL's UNet.

    Dims: hidden (channels of the first level), in, out, text, vector (pooled text and size embeddings), and the blocks
    of a transformer on the second level (middle) and on the third and between the ways down and up (deep).
    """

    name = "SDXL"
    class_names: frozenset[str] = frozenset()  # no base: see above
    config_only: frozenset[str] = frozenset()

    def naming(self, names: Collection[str]) -> Naming | None:
        saved = _SAVED.search("\n".join(names))
        return Naming("native", saved["prefix"]) if saved else None

    def dims_from_tensors(self, tensors: Mapping[str, TensorInfo], naming: Naming) -> Dims:
        diffusers, prefix = naming.style == "diffusers", naming.prefix

        def shape(native: str, stored: str, dimensions: int = 2) -> tuple[int, ...]:
            return shape_of(tensors, f"{stored if diffusers else prefix + native}.weight", dimensions)

        second, third = (("down_blocks.1.attentions.0", "down_blocks.2.attentions.0") if diffusers else
                         (f"{prefix}input_blocks.4.1", f"{prefix}input_blocks.7.1"))
        hidden, channels = shape("input_blocks.0.0", "conv_in", 4)[:2]
        dims = {
            "hidden": hidden, "in": channels, "out": shape("out.2", "conv_out", 4)[0],
            "text": shape("input_blocks.4.1.transformer_blocks.0.attn2.to_k",
                          "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")[1],
            "vector": shape("label_emb.0.0", "add_embedding.linear_1")[1],
            "middle": count_blocks(tensors, f"{second}.transformer_blocks"),
            "deep": count_blocks(tensors, f"{third}.transformer_blocks"),
        }
        other = [f"{key} {dims[key]} (SDXL: {size})" for key, size in SIZES.items() if dims[key] != size]
        if other:
            raise ValueError(Text("this UNet is not of SDXL's sizes, which are all that ComfyUI knows: {other}",
                                  other=", ".join(other)))
        return dims

    def dims_from_config(self, config: Mapping[str, Any]) -> Dims:
        check_fixed(config, FIXED, self.name)
        widths, depths, heads = (list(value) if isinstance(value, list | tuple) else list[Any]([value]) for value in (
            config.get(key) for key in ("block_out_channels", "transformer_layers_per_block", "attention_head_dim")))
        hidden = widths[0] if isinstance(widths[0], int) else 0
        if widths != [size * hidden for size in LEVELS] or len(depths) != len(LEVELS) \
                or heads[1:] != [width // HEAD for width in widths[1:]]:  # diffusers means heads by head_dim here
            raise ValueError(Text("config.json: block_out_channels {widths}, transformer_layers_per_block {depths} and "
                                  "attention_head_dim {heads} are not an SDXL UNet", widths=widths, depths=depths,
                                  heads=heads))
        return {
            "hidden": hidden, "in": config_int(config, "in_channels", 4), "out": config_int(config, "out_channels", 4),
            "text": config_int(config, "cross_attention_dim", 1280),
            "vector": config_int(config, "projection_class_embeddings_input_dim", 0),
            "middle": depths[1], "deep": depths[2],
        }

    def dims_from_model(self, unet_config: Mapping[str, Any]) -> Dims | None:
        down, up = unet_config.get("transformer_depth") or [], unet_config.get("transformer_depth_output")
        if unet_config.get("channel_mult") != list(LEVELS) or unet_config.get("num_res_blocks") != [RESNETS] * 3 \
                or unet_config.get("use_temporal_attention") or len(down) != 6 or not unet_config["adm_in_channels"]:
            return None
        middle, deep = down[2], down[4]
        if down != [0, 0, middle, middle, deep, deep] or up != [*[0] * 3, *[middle] * 3, *[deep] * 3] \
                or unet_config["transformer_depth_middle"] != deep or not middle or not deep:
            return None  # pruned ones: SSD-1B, Vega
        return {
            "hidden": unet_config["model_channels"], "in": unet_config["in_channels"],
            "out": unet_config["out_channels"], "text": unet_config["context_dim"],
            "vector": unet_config["adm_in_channels"], "middle": middle, "deep": deep,
        }

    def modules(self, dims: Dims, naming: Naming) -> Iterator[Module]:
        sizes = {**dims, "time": 4 * dims["hidden"]}
        yield from expand(FIRST, sizes, naming)
        for unit in units(dims):
            own = {**sizes, "columns": unit.columns, "rows": unit.rows, "4rows": 4 * unit.rows, "8rows": 8 * unit.rows}
            yield from expand(unit.table, own, naming, f"{unit.native}.", f"{unit.stored}.")
            for i in range(unit.depth):
                block = f".transformer_blocks.{i}."
                yield from expand(BLOCK, own, naming, unit.native + block, unit.stored + block)
        yield from expand(LAST, sizes, naming)

    def marks(self, dims: Dims) -> tuple[str, ...]:
        return ()

    def inputs(self, dims: Dims) -> Inputs:
        # CLIP-L and CLIP-G side by side, in chunks of 77; the host makes six embeddings of sizes itself
        return Inputs((77, dims["text"]), dims["vector"] - 6 * SIZE_EMBEDDING, patch=0)


SDXL = Sdxl()

"""SDXL as Nunchaku stores it (docs/sources/nunchaku.md, "Names"): diffusers' names, legacy suffixes, nothing unsigned
(its feed-forward is gated) and no modulation. Convolutions, norms, embeddings, proj_in, proj_out, and attn2.to_k and
to_v are not quantized."""

from __future__ import annotations

import re

from ...architectures import Dims
from ...architectures.sdxl import SDXL, units
from .table import Block, Family, to

BLOCK = {
    "attn1.to_qkv": to("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.to_out.0": to("attn1.to_out.0"),
    "attn2.to_q": to("attn2.to_q"),
    "attn2.to_out.0": to("attn2.to_out.0"),
    "ff.net.0.proj": to("ff.net.0.proj"),
    "ff.net.2": to("ff.net.2"),
}


def _blocks(dims: Dims) -> tuple[Block, ...]:
    return tuple(Block(f"{unit.native}.transformer_blocks", f"{unit.stored}.transformer_blocks", unit.depth, BLOCK)
                 for unit in units(dims) if unit.depth)


FAMILY = Family(SDXL, re.compile(r"^(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\."
                                 r"\d+\.attn1\.to_qkv\.qweight$", re.MULTILINE),
                _blocks, frozenset({"NunchakuSDXLUNet2DConditionModel", "UNet2DConditionModel"}))

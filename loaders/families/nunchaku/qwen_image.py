"""Qwen-Image and Qwen-Image-Edit as Nunchaku stores them (docs/sources/nunchaku.md, "Names")."""

from __future__ import annotations

import re

from ...architectures import Dims
from ...architectures.qwen_image import QWEN_IMAGE
from .table import Block, Family, to

BLOCK = {
    "img_mod.1": to("img_mod.1", awq=6),
    "txt_mod.1": to("txt_mod.1", awq=6),
    "attn.to_qkv": to("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": to("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": to("attn.to_out.0"),
    "attn.to_add_out": to("attn.to_add_out"),
    "img_mlp.net.0.proj": to("img_mlp.net.0.proj"),
    "img_mlp.net.2": to("img_mlp.net.2", unsigned=True),
    "txt_mlp.net.0.proj": to("txt_mlp.net.0.proj"),
    "txt_mlp.net.2": to("txt_mlp.net.2", unsigned=True),
}


def _blocks(dims: Dims) -> tuple[Block, ...]:
    return (Block("transformer_blocks", "transformer_blocks", dims["layers"], BLOCK),)


FAMILY = Family(QWEN_IMAGE, re.compile(r"^transformer_blocks\.\d+\.(img_mod\.1|attn\.add_qkv_proj)\.qweight$",
                                       re.MULTILINE),
                _blocks, frozenset({"NunchakuQwenImageTransformer2DModel", "QwenImageTransformer2DModel"}))

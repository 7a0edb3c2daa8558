"""FLUX.1 as Nunchaku stores it (docs/sources/nunchaku.md, "Names")."""

from __future__ import annotations

import re

from ...architectures import Dims
from ...architectures.flux1 import FLUX1
from .table import Block, Family, to

DOUBLE = {
    "norm1.linear": to("img_mod.lin", awq=6),
    "norm1_context.linear": to("txt_mod.lin", awq=6),
    "qkv_proj": to("img_attn.qkv"),
    "qkv_proj_context": to("txt_attn.qkv"),
    "out_proj": to("img_attn.proj"),
    "out_proj_context": to("txt_attn.proj"),
    "mlp_fc1": to("img_mlp.0"),
    "mlp_fc2": to("img_mlp.2", unsigned=True),
    "mlp_context_fc1": to("txt_mlp.0"),
    "mlp_context_fc2": to("txt_mlp.2", unsigned=True),
}
# The host has one Linear where Nunchaku has two, each with its own smoothing and low rank: linear1 joins them by rows,
# linear2 by columns.
SINGLE = {
    "norm.linear": to("modulation.lin", awq=3),
    "qkv_proj": to("linear1", rows=3),
    "mlp_fc1": to("linear1", row=3, rows=4),
    "out_proj": to("linear2", columns=1),
    "mlp_fc2": to("linear2", column=1, columns=4, unsigned=True),
}


def _blocks(dims: Dims) -> tuple[Block, ...]:
    return (Block("double_blocks", "transformer_blocks", dims["double"], DOUBLE),
            Block("single_blocks", "single_transformer_blocks", dims["single"], SINGLE))


FAMILY = Family(
    FLUX1, re.compile(r"^(single_)?transformer_blocks\.\d+\.qkv_proj\.qweight$", re.MULTILINE), _blocks,
    frozenset({"NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModel", "NunchakuFluxTransformer2DModelV2",
               "FluxTransformer2DModel", "Flux", "FluxSchnell"}),
    {f"attn.{name}": name for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")})

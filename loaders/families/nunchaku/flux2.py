"""FLUX.2 [klein] as Nunchaku's community builds store it (docs/sources/nunchaku.md, "Names"): under FLUX.1's names with
legacy suffixes, or under those of Nunchaku's Python runtime. Its feed-forwards are gated, so nothing is unsigned;
modulation is BF16 and shared by all blocks; the model has no biases, the files hold zeros."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...architectures import Dims
from ...architectures.flux2 import FLUX2
from .table import Block, Entry, Family, Table, to

# Nunchaku's convert_flux2_state_dict: FLUX.1's name -> the Python runtime's.
DOUBLE = {
    "qkv_proj": ("attn.to_qkv", to("img_attn.qkv")),
    "qkv_proj_context": ("attn.to_added_qkv", to("txt_attn.qkv")),
    "out_proj": ("attn.to_out.0", to("img_attn.proj")),
    "out_proj_context": ("attn.to_add_out", to("txt_attn.proj")),
    "mlp_fc1": ("ff.linear_in", to("img_mlp.0")),
    "mlp_fc2": ("ff.linear_out", to("img_mlp.2")),
    "mlp_context_fc1": ("ff_context.linear_in", to("txt_mlp.0")),
    "mlp_context_fc2": ("ff_context.linear_out", to("txt_mlp.2")),
}
# As in FLUX.1, the host has one Linear where Nunchaku has two; the gated feed-forward is 3 wide, its first layer 6.
SINGLE = {
    "qkv_proj": ("attn.qkv_proj", to("linear1", rows=3)),
    "mlp_fc1": ("attn.mlp_fc1", to("linear1", row=3, rows=6)),
    "out_proj": ("attn.out_proj", to("linear2", columns=1)),
    "mlp_fc2": ("attn.mlp_fc2", to("linear2", column=1, columns=3)),
}
CLASSES = frozenset({"NunchakuFlux2Transformer2DModel", "NunchakuFlux2Transformer2DModelV1", "Flux2Transformer2DModel"})


def _family(mark: str, named: int, plain: Mapping[str, str]) -> Family:
    """`named`: 0 for FLUX.1's names, 1 for the runtime's."""
    def table(rows: Mapping[str, tuple[str, Entry]]) -> Table:
        return {(name, new)[named]: entry for name, (new, entry) in rows.items()}

    double, single = table(DOUBLE), table(SINGLE)

    def blocks(dims: Dims) -> tuple[Block, ...]:
        return (Block("double_blocks", "transformer_blocks", dims["double"], double),
                Block("single_blocks", "single_transformer_blocks", dims["single"], single))

    # FLUX.1 has no modulation that all its blocks share
    return Family(FLUX2, re.compile(rf"^{mark}\.qweight$", re.MULTILINE), blocks, CLASSES, plain,
                  beside="double_stream_modulation_img.")


FAMILIES = (
    _family(r"(single_)?transformer_blocks\.\d+\.qkv_proj", 0,
            {f"attn.{name}": name for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}),
    _family(r"(single_transformer_blocks\.\d+\.attn\.qkv_proj|transformer_blocks\.\d+\.attn\.to_qkv)", 1, {}))

"""Original Wan names (the vendor's and ComfyUI's) <-> diffusers' names, for every tensor of a ModelSlim export.

Whole names are looked up, never replaced in parts: the ordered list of `str.replace` in SGLang's `wan_repack.py`
gives the same tensor names, but also changes names that merely contain one of its words, and leaves what
only the description names behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ...host.texts import Text
from ...loaders.architectures.base import Module, Naming, count_blocks, tensor_name
from ...loaders.architectures.wan import WAN
from ...loaders.errors import CheckpointError
from ...loaders.words import first_ten

# What a quantized Linear may have beside weight and bias (docs/sources/ascend.md, "Stored tensors"); data is
# copied, not read.
QUANT_LEAVES = ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale", "scale_bias",
                "weight_dual_scale", "svd_lowrank_l1", "svd_lowrank_l2", "left_trans", "right_trans", "clip_ratio")
ATTENTION_LEAVES = ("q_rot", "k_rot", "quant_type",
                    *(f"{fa}_{x}.{leaf}" for fa in ("fa", "fa3") for x in "qkv" for leaf in ("scale", "offset")))
ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
DIRECTIONS = ("to diffusers", "to original")


def modules(names: Collection[str], to_diffusers: bool) -> list[Module]:
    """Every module of the Wan that has these tensor names; `native` is the original name, `stored` diffusers'."""
    embedder = "img_emb." if to_diffusers else "condition_embedder.image_embedder."
    positions = embedder + ("emb_pos" if to_diffusers else "pos_embed")
    dims = dict.fromkeys(("hidden", "in", "out", "ffn"), 1)  # names do not depend on them
    dims |= {"layers": count_blocks(names, "blocks"), "image": int(any(n.startswith(embedder) for n in names)),
             "positions": int(positions in names)}
    return list(WAN.modules(dims, Naming("diffusers")))


def _pairs(module: Module, smoothed: bool) -> Iterator[tuple[str, str]]:
    """(original, diffusers) name of every tensor that a module can have; a smoothed Linear sits in a wrapper."""
    native, stored = module.native, module.stored[0]
    if module.leaf != "weight":
        yield tensor_name(native, module.leaf), tensor_name(stored, module.stored_leaf)
        return
    inner = f"{native}.linear" if smoothed else native
    for leaf in ("weight", "bias", *(QUANT_LEAVES if module.linear else ())):
        yield f"{inner}.{leaf}", f"{stored}.{leaf}"
    if module.linear:
        yield f"{native}.div.mul_scale" if smoothed else f"{native}.mul_scale", f"{stored}.mul_scale"


def name_map(names: Collection[str], direction: str, where: object) -> dict[str, str]:
    """Old -> new name for every name that a Wan with these tensors can have in its tensors and its description.

    One to one by construction, and its own inverse in the other direction. Going back, a layer that has a mul_scale
    gets the wrapper's names again (`.linear.`, `.div.`). Raises CheckpointError when `names` hold something that is no
    Wan tensor, or lack one.
    """
    to_diffusers = direction == DIRECTIONS[0]
    try:
        known = modules(names, to_diffusers)
    except ValueError as error:
        raise CheckpointError(error, where, Text("copy it from the export again")) from error
    pairs: list[tuple[str, str]] = []
    lost: list[str] = []
    for module in known:
        if to_diffusers:
            smoothed = f"{module.native}.div.mul_scale" in names
        else:
            smoothed = module.linear and f"{module.stored[0]}.mul_scale" in names
        mine = list(_pairs(module, smoothed))
        pairs += mine
        needed = [pair[not to_diffusers] for pair in mine[:1 + (module.bias and module.leaf == "weight")]]
        lost += [name for name in needed if name not in names
                 and not (name.endswith(".bias") and name.removesuffix("bias") + "quant_bias" in names)]
    blocks = {m.native.partition(".self_attn.")[0] for m in known if ".self_attn." in m.native}
    pairs += [(f"{block}.{ours}.{leaf}", f"{block}.{theirs}.{leaf}") for block in sorted(blocks)
              for ours, theirs in ATTENTIONS for leaf in ATTENTION_LEAVES]
    renamed = dict(pairs) if to_diffusers else {new: old for old, new in pairs}
    if not to_diffusers:  # as SGLang's wan_repack.py leaves them behind
        renamed |= {f"{block}.attn1.to_{x}_rot": f"{block}.self_attn.{x}_rot" for block in blocks for x in "qk"}
        renamed |= {name: name for block in blocks for ours, _ in ATTENTIONS
                    if (name := f"{block}.{ours}.quant_type")}
    unknown = [name for name in names if name not in renamed]
    style = Text("the original naming of Wan") if to_diffusers else Text("diffusers' naming of Wan")
    if unknown:
        raise CheckpointError(Text("{count} tensors have no place in {style}: {names}", count=len(unknown), style=style,
                                   names=first_ten(unknown)), where,
                              Text("check the direction: this is '{direction}'", direction=direction))
    if lost:
        raise CheckpointError(Text("{count} tensors of a Wan are missing: {names}", count=len(lost),
                                   names=first_ten(lost)), where,
                              Text("finish the download or the export of this folder"))
    return renamed

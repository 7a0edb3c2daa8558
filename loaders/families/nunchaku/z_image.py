"""Z-Image as Nunchaku stores it (docs/sources/nunchaku.md, "Names"), and as vLLM-Omni's converter renames that.
Modulation is BF16; Nunchaku's refiners may be."""

from __future__ import annotations

import re

from ...architectures import Dims
from ...architectures.z_image import REFINERS, Z_IMAGE
from .table import Block, Family, to

BLOCK = {
    "attention.to_qkv": to("attention.qkv"),
    "attention.to_out.0": to("attention.out"),
    "feed_forward.net.0.proj": to("feed_forward.w3", "feed_forward.w1"),  # the values' rows first, then the gate's
    "feed_forward.net.2": to("feed_forward.w2"),
}


VLLM_BLOCK = {
    **{name: entry for name, entry in BLOCK.items() if name.startswith("attention.")},
    "feed_forward.w13": to("feed_forward.w1", "feed_forward.w3"),  # exchanged: the gate's rows first
    "feed_forward.w2": to("feed_forward.w2"),
}
CLASSES = frozenset({"NunchakuZImageTransformer2DModel", "ZImageTransformer2DModel"})


def _blocks(dims: Dims) -> tuple[Block, ...]:
    return (Block("noise_refiner", "noise_refiner", REFINERS, BLOCK, optional=True),
            Block("context_refiner", "context_refiner", REFINERS, BLOCK, optional=True),
            Block("layers", "layers", dims["layers"], BLOCK))


def _vllm_blocks(dims: Dims) -> tuple[Block, ...]:
    # No block is optional: the converter exchanges the halves of quantized layers alone, and leaves open which are an
    # unquantized one's.
    return tuple(Block(stack, stack, count, VLLM_BLOCK) for stack, count in (
        ("noise_refiner", REFINERS), ("context_refiner", REFINERS), ("layers", dims["layers"])))


FAMILY = Family(Z_IMAGE, re.compile(r"^layers\.\d+\.attention\.to_qkv\.qweight$", re.MULTILINE), _blocks, CLASSES)
VLLM = Family(Z_IMAGE, re.compile(r"^layers\.\d+\.feed_forward\.w13\.qweight$", re.MULTILINE), _vllm_blocks, CLASSES)

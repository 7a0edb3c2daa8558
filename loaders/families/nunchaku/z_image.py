"""Z-Image as Nunchaku stores it (docs/sources/nunchaku.md, "Names"). Modulation is BF16; refiners may be."""

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


def _blocks(dims: Dims) -> tuple[Block, ...]:
    return (Block("noise_refiner", "noise_refiner", REFINERS, BLOCK, optional=True),
            Block("context_refiner", "context_refiner", REFINERS, BLOCK, optional=True),
            Block("layers", "layers", dims["layers"], BLOCK))


FAMILY = Family(Z_IMAGE, re.compile(r"^layers\.\d+\.attention\.to_qkv\.qweight$", re.MULTILINE), _blocks,
                frozenset({"NunchakuZImageTransformer2DModel", "ZImageTransformer2DModel"}))

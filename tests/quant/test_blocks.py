"""The host's order of NVFP4's bytes (quant/blocks.py), against comfy-kitchen's own functions and plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked

from quantized_transformers.quant import blocks


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 20), (192, 20), (40, 3), (1, 1)])
def test_scales_in_tiles_are_the_hosts(rows, columns):
    scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    tiles = blocks.swizzle(scale.view(torch.float8_e4m3fn))
    assert torch.equal(tiles.view(torch.uint8), to_blocked(scale, flatten=False))
    back = blocks.linear_blocks(tiles, rows, columns * 8)
    assert back.dtype == torch.float8_e4m3fn
    assert torch.equal(back.view(torch.uint8), from_blocked(tiles.view(torch.uint8), rows, columns))


def test_scales_that_lie_apart():
    scale = torch.randint(0, 256, (160, 24), dtype=torch.uint8)
    assert torch.equal(blocks.swizzle(scale[:, 3:20]), to_blocked(scale[:, 3:20].contiguous(), flatten=False))


@pytest.mark.parametrize("shape", [(3000, 104), (7, 3), (0, 8)])  # more than one piece; odd; none
def test_nibbles_are_exchanged(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    kept, expected = codes.clone(), codes // 16 + codes % 16 * 16
    assert torch.equal(blocks.swap_nibbles(codes), expected) and torch.equal(codes, kept)
    assert torch.equal(blocks.swap_nibbles(codes.t()), expected.t())
    assert blocks.swap_nibbles(codes, codes) is codes and torch.equal(codes, expected)

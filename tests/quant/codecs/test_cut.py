"""Rows of a stored layer as a layer of their own, against the same rows of its weight."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.quant.codecs import codec, cut
from quantized_transformers.quant.codecs.fp8 import FP8_FORMAT
from quantized_transformers.quant.codecs.fp8_blocks import FP8BlocksFormat
from quantized_transformers.quant.codecs.nvfp4 import NVFP4Format
from quantized_transformers.quant.packed.gptq import AWQ, GPTQ
from quantized_transformers.quant.stored import MODELOPT_ORDER, ByteOrder, plain_tile
from quantized_transformers.quant.tile import Coded, Place, Tile
from support import packed
from support.passthrough import fp8, nvfp4

pytestmark = pytest.mark.unit

ROWS, COLUMNS = 256, 128
COMFY = ByteOrder(low_first=False, swizzled=True)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(weight):
    codes, _ = fp8(weight)
    scale = 1 + torch.rand(2, 1, generator=torch.Generator().manual_seed(1))
    return {"weight": codes["weight"], "weight_scale": scale}


def words(pack, fmt):
    return lambda weight: fmt.coded("layer", {"weight" if leaf == "qweight" else leaf: tensor
                                              for leaf, tensor in pack(weight)[0].items()}, ByteOrder())


def low_rank(weight):
    tile = plain_tile(weight).having(up=rand(ROWS, 4, seed=2), down=rand(COLUMNS, 4, seed=3))
    return Coded((tile,), rand(ROWS, seed=4))


def two_tiles(weight):
    return Coded((plain_tile(weight[:96]), plain_tile(weight[96:]).at(96)), rand(ROWS, seed=4), delta=rand(ROWS, COLUMNS, seed=5))

LAYERS = {
    "plain, with a low-rank branch": low_rank,
    "two tiles, and a delta": two_tiles,
    "FP8": lambda w: FP8_FORMAT.coded("layer", fp8(w)[0] | {"input_scale": torch.tensor(0.1), "bias": rand(ROWS)}, MODELOPT_ORDER),
    "FP8, blocks of rows": lambda w: FP8BlocksFormat().coded("layer", blocks(w), MODELOPT_ORDER),
    "NVFP4, ModelOpt": lambda w: NVFP4Format().coded("layer", nvfp4(w, False)[0], MODELOPT_ORDER),
    "NVFP4, ComfyUI": lambda w: NVFP4Format().coded("layer", nvfp4(w, True)[0], COMFY),
    "GPTQ": words(lambda w: packed.gptq(w, 4, 32, zeros=True), GPTQ(4, 1, 32)),
    "AWQ": words(lambda w: packed.awq(w, 32), AWQ(32))}


def weight_of(layer, rows):
    weight = torch.zeros(rows, COLUMNS) if layer.delta is None else layer.delta.clone()
    for tile in layer.tiles:
        place = tile.place
        weight[place.row:place.row + place.rows] += codec(place.codec).dequantize(tile, torch.float32)
    return weight


@pytest.mark.parametrize("first, rows", [(0, 128), (128, 128), (16, 96), (80, 176)])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_alone(name, first, rows):
    layer = LAYERS[name](rand(ROWS, COLUMNS))
    alone = cut(layer, first, rows)
    assert torch.equal(weight_of(alone, rows), weight_of(layer, ROWS)[first:first + rows])
    assert sum(tile.place.rows for tile in alone.tiles) == rows
    assert (alone.bias is None) == (layer.bias is None)
    if layer.bias is not None:
        assert torch.equal(alone.bias, layer.bias[first:first + rows])
    if "input_scale" in layer.tiles[0].fields:  # all rows have these in common
        assert torch.equal(alone.tiles[0]["input_scale"], layer.tiles[0]["input_scale"])
        assert torch.equal(alone.tiles[0]["scale"], layer.tiles[0]["scale"])


def test_rows_that_are_not_alone():
    with pytest.raises(ValueError, match="4 rows from 12 on"):
        cut(LAYERS["AWQ"](rand(ROWS, COLUMNS)), 12, 4)
    with pytest.raises(ValueError, match="cannot be taken alone"):
        cut(Coded((Tile(Place("svdq_int4", ROWS, COLUMNS)),)), 0, 128)

"""Tiles in GPTQ's and AWQ's own bytes, against the weight that the packers' formulas mean (support/packed.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.packed.gptq import AWQ, GPTQ
from quantized_transformers.quant.stored import ByteOrder
from quantized_transformers.quant.tile import Tile
from support import packed

pytestmark = pytest.mark.unit

COLUMNS, SIZE = 128, 32


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS: dict[str, tuple[Callable[..., packed.Layer], GPTQ | AWQ]] = {
    "u4_gptq": (lambda w: packed.gptq(w, 4, SIZE, zeros=True), GPTQ(4, 1, SIZE)),
    "u4_gptq, columns in another order": (lambda w: packed.gptq(w, 4, SIZE, zeros=True, order=True), GPTQ(4, 1, SIZE)),
    "u8_gptq": (lambda w: packed.gptq(w, 8, SIZE, zeros=True), GPTQ(8, 1, SIZE)),
    "u4_awq": (lambda w: packed.awq(w, SIZE), AWQ(SIZE))}


def made(name: str, rows: int = 48, seed: int = 0) -> tuple[Tile, torch.Tensor, torch.Tensor]:
    """(the tile, the weight it means, the words of the file)."""
    pack, fmt = LAYERS[name]
    part, meant = pack(rand(rows, COLUMNS, seed=seed))
    coded = fmt.coded("layer", {"weight" if leaf == "qweight" else leaf: tensor for leaf, tensor in part.items()}, ByteOrder())
    tile, = coded.tiles
    assert tile.place.codec == fmt.codec == name.partition(",")[0]
    return tile, meant, part["qweight"]


@pytest.mark.parametrize("name", LAYERS)
def test_views_of_the_file_mean_its_weight(name):
    tile, meant, words = made(name)
    assert tile["codes"].data_ptr() == words.data_ptr() and tile["scale"].dtype == torch.float16
    kind = codec(tile.place.codec)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = kind.dequantize(tile, dtype)
        assert weight.is_contiguous() and torch.equal(weight, meant.to(dtype))
        assert torch.equal(kind.residual(tile, dtype), weight)


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_at_any_place_of_a_file(name):
    """Saved files have bytes where they come; a view of words begins at a multiple of four."""
    tile, meant, _ = made(name)
    kind, codes = codec(tile.place.codec), tile["codes"]
    for offset in range(4):
        moved = torch.empty(codes.numel() + offset, dtype=torch.uint8)[offset:].view(codes.shape).copy_(codes)
        there = tile.having(codes=moved)
        assert torch.equal(kind.dequantize(there, torch.float32), meant)
        held = kind.loaded(there, torch.float32)["codes"]
        assert held.storage_offset() % 4 == 0 and (held.data_ptr() == moved.data_ptr()) is (offset == 0)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_it(name):
    (tile, meant, _), kind = made(name), codec(name.partition(",")[0])
    index = torch.tensor([5, 47, 5, 0])
    assert torch.equal(kind.looked_up(tile, index, torch.float32), meant[index])
    assert torch.equal(kind.dequantize(kind.swapped(tile), torch.float32), meant.roll(24, 0))
    up, down = rand(48, 4, seed=1), rand(COLUMNS, 4, seed=2)
    beside = kind.swapped(tile.having(up=up, down=down))
    assert torch.equal(beside["up"], up.roll(24, 0)) and torch.equal(beside["down"], down)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_one_below_the_other(name):
    found = [made(name, rows, seed) for seed, rows in enumerate((16, 48, 8))]
    whole = codec(name.partition(",")[0]).merge([tile for tile, *_ in found])
    assert whole is not None and whole.place.rows == 72
    weight = codec(whole.place.codec).dequantize(whole, torch.float32)
    assert torch.equal(weight, torch.cat([meant for _, meant, _ in found]))


def test_layers_that_are_not_alike_stay_apart():
    first, other = made("u4_gptq")[0], made("u4_gptq, columns in another order")[0]
    assert codec("u4_gptq").merge([first, other]) is None
    assert codec("u4_gptq").merge([first, first.having(scale=first["scale"].float())]) is None
    assert codec("u4_gptq").merge([first.having(up=rand(48, 4), down=rand(128, 4))] * 2) is None


@pytest.mark.parametrize("name", LAYERS)
def test_as_groups(name):
    (tile, meant, _), kind = made(name), codec(name.partition(",")[0])
    groups = kind.grouped(tile)
    assert groups.place.codec == f"u{kind.bits}_groups"
    assert torch.equal(codec(groups.place.codec).dequantize(groups, torch.float32), meant)


def test_halves_within_a_word_of_awq():
    tile = made("u4_awq", 8)[0]
    with pytest.raises(ValueError, match="halves of a layer of 8 rows"):
        codec("u4_awq").swapped(tile)

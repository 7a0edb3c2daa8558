"""Decoding rows on a CPU, against every codec's definition (comfy-kitchen's eager operations, or the packers' formulas),
bit by bit; and products made of such rows, against the same weights in F64."""

from __future__ import annotations

import threading

import pytest
import torch

from quantized_transformers.quant import multiply
from quantized_transformers.quant.codecs import codecs
from quantized_transformers.quant.kernels import by_tiles
from quantized_transformers.quant.kernels.base import DEQUANTIZE, Activation
from quantized_transformers.quant.layouts.tiled import parameter, params_of
from quantized_transformers.quant.tile import Place, Tile
from support.tiles import any_bytes, usual

pytestmark = pytest.mark.unit

ROWS, COLUMNS = 320, 512
GROUPS = 16  # of a row
DECODED = [name for name in codecs() if name != "plain"]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def alike(name, a, b):
    """Bit by bit, but for rotated rows: a product, which may sum in another order for another number of rows."""
    if "convrot" in name:
        return torch.testing.assert_close(a, b, rtol=0, atol=256 * 2.0 ** -24 * float(b.abs().max()) * 16)
    return same(a, b)


OPTIONAL = [name for name in DECODED if any(field.optional for leaf, field in codecs()[name].fields.items()
                                            if leaf not in ("down", "up"))]


@pytest.mark.parametrize("name, optional", [*((name, False) for name in DECODED), *((name, True) for name in OPTIONAL)])
def test_rows_are_the_definition_bit_by_bit(name, optional):
    kind = codecs()[name]
    tile = any_bytes(name, ROWS, COLUMNS, groups=GROUPS, optional=optional)
    wanted = kind.residual(tile, torch.float32)
    assert wanted.isfinite().any()
    step = 8 if "gptq" in name or "awq" in name and name != "awq" else 1  # words hold rows of eight
    for rows in (1, 2, 7, 64, 256):
        rows = max(rows // step * step, step)
        for first in (0, 64, ROWS - rows):
            out = torch.full((rows, COLUMNS), 7.0)
            kind.decode_rows(tile, first, first + rows, out)
            alike(name, out, wanted[first:first + rows])


@pytest.mark.parametrize("name", DECODED)
def test_one_thread_decodes_in_larger_pieces_what_several_do(name):
    tile, found = any_bytes(name, ROWS, COLUMNS, groups=GROUPS, optional=name in OPTIONAL), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(torch.full((ROWS, COLUMNS), float(count)))
            codecs()[name].decode_rows(tile, 0, ROWS, found[-1])
    finally:
        torch.set_num_threads(threads)
    alike(name, *found)


@pytest.mark.parametrize("nan", [False, True])
def test_every_e4m3_code_with_every_e8m0_scale(nan):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes[:, 127::128] = codes[:, 127::128] if nan else 0
    scale = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, 8)
    out, tile = torch.empty(256, 256), Tile(Place("w8a8_mxfp8", 256, 256), {"codes": codes.view(torch.float8_e4m3fn), "scale": scale})
    for first, last in ((0, 256), (0, 240), (100, 101)):
        codecs()["w8a8_mxfp8"].decode_rows(tile, first, last, out[first:last])
        exact = tile["codes"].double() * 2.0 ** (torch.arange(256.0, dtype=torch.float64).unsqueeze(1) - 127)
        exact[255] = torch.nan
        same(out[first:last], exact[first:last].float())


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 0.5, 6e35, 7e35, 1e38])
def test_every_e4m3_code_with_scales_of_any_size(scale):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 64)
    clean = codes.clone()
    clean.view(torch.uint8)[(codes.view(torch.uint8) & 127) == 127] = 0
    for part in (codes, clean):
        out = torch.empty(4, 64)
        tile = Tile(Place("fp8", 4, 64), {"codes": part, "scale": torch.tensor(scale)})
        codecs()["fp8"].decode_rows(tile, 0, 4, out)
        same(out, part.float() * torch.tensor(scale))


def test_subnormal_codes_where_the_processor_flushes_them():
    codes = torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 8)
    tile, out = Tile(Place("fp8", 1, 8), {"codes": codes, "scale": torch.tensor(3.0)}), torch.empty(1, 8)
    assert torch.set_flush_denormal(True)
    try:
        codecs()["fp8"].decode_rows(tile, 0, 1, out)
    finally:
        torch.set_flush_denormal(False)
    same(out, codes.float() * 3)


FINITE = [name for name in DECODED if not name.startswith("ggml")]  # whose random bytes hold any F16


@pytest.mark.parametrize("tokens, rows", [(1, 128), (7, 512), (64, 512), (300, 128)])
@pytest.mark.parametrize("name", FINITE)
def test_product(name, tokens, rows, monkeypatch):
    """In one piece and 128 rows at a time. Each of 512 products, with its sum, is rounded in F32, and so are shift and bias: (512 + 3) * 2^-24 of the sum of
    magnitudes bounds the error."""
    monkeypatch.setattr(by_tiles, "VALUES", rows * COLUMNS)
    kind, tile = codecs()[name], usual(name, ROWS, COLUMNS)
    x, bias = torch.randn(tokens, COLUMNS), torch.randn(ROWS)
    assert by_tiles.takes(x)
    weight = kind.residual(tile, torch.float32).double()
    shift = kind.shift(weight) if kind.shifts else 0
    assert weight.isfinite().all() and weight.abs().max() > 0
    for own in (None, bias):
        exact = x.double() @ weight.t() + (shift if own is None else shift + own.double())
        size = x.double().abs() @ weight.abs().t() + bias.abs() + (kind.shift(weight.abs()) if kind.shifts else 0)
        found = DEQUANTIZE.linear(Activation(x), tile, own)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert ((found - exact).abs() <= 515 * 2.0 ** -24 * size).all()


@pytest.mark.parametrize("ranks", [(0, 0, 0, 0), (8, 0, 32, 16)])
@pytest.mark.parametrize("rows", [4096, 128])
def test_product_of_several_tiles(rows, ranks, monkeypatch):
    """One below the other, of any codecs: at once, and in pieces that do not end where tiles do. The bound is that of one tile, and
    for a low-rank branch its two sums and the addition."""
    monkeypatch.setattr(by_tiles, "VALUES", rows * COLUMNS)
    names, heights = ("fp8", "svdq_int4_unsigned", "nvfp4", "w8a16"), (320, 64, 128, 192)
    tiles, at = [], 0
    for i, (name, height, rank) in enumerate(zip(names, heights, ranks, strict=True)):
        tile = usual(name, height, COLUMNS, seed=i)
        low = {"down": torch.randn(COLUMNS, rank) / 20, "up": torch.randn(height, rank) / 20} if rank else {}
        tiles.append(tile.having(**low).at(at))
        at += height
    weight = parameter(*params_of(tiles, torch.float32, (at, COLUMNS)))
    x, bias = torch.randn(7, COLUMNS), torch.randn(at)
    residuals = [codecs()[name].residual(tile, torch.float32).double() for name, tile in zip(names, tiles, strict=True)]
    shift = codecs()[names[1]].shift(residuals[1])
    added = torch.zeros(at).double().index_add(0, torch.arange(320, 384), shift)
    branches = [tile["up"].double() @ tile["down"].double().t() if "up" in tile.fields else 0 for tile in tiles]
    sizes = [tile["up"].double().abs() @ tile["down"].double().abs().t() if "up" in tile.fields else 0 for tile in tiles]
    dense = torch.cat([residual + branch for residual, branch in zip(residuals, branches, strict=True)])
    magnitudes = torch.cat([residual.abs() + size for residual, size in zip(residuals, sizes, strict=True)])
    shift_size = torch.zeros(at).double().index_add(0, torch.arange(320, 384), codecs()[names[1]].shift(residuals[1].abs()))
    for own in (None, bias):
        exact = x.double() @ dense.t() + added + (0 if own is None else own.double())
        size = x.double().abs() @ magnitudes.t() + shift_size + bias.abs()
        found = multiply.linear(x, weight, own)
        assert found.is_contiguous() and ((found - exact).abs() <= (515 + max(ranks) + 3) * 2.0 ** -24 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_without_units_is_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr(by_tiles, "has_units", lambda dtype: False)
    tile, x = usual("nvfp4", ROWS, COLUMNS), torch.randn(16, COLUMNS).to(dtype)
    weight = codecs()["nvfp4"].residual(tile, torch.float32)
    exact = x.double() @ weight.double().t()
    found = DEQUANTIZE.linear(Activation(x), tile, None)
    step = torch.finfo(dtype).eps / 2 * exact.abs() + 512 * 2.0 ** -24 * (x.double().abs() @ weight.double().abs().t())
    assert found.dtype == dtype and ((found.double() - exact).abs() <= 1.01 * step).all()


def test_with_units_16_bit_stays_the_hosts(monkeypatch):
    monkeypatch.setattr(by_tiles, "has_units", lambda dtype: True)
    assert not by_tiles.takes(torch.randn(2, 2).bfloat16())


def test_what_is_differentiated_or_compiled_is_left_alone():
    assert not by_tiles.takes(torch.randn(2, 2, requires_grad=True))
    assert not by_tiles.takes(torch.randn(2, 2, device="meta")) and not by_tiles.takes(torch.randn(2, 2).double())


def test_products_share_nothing():
    """Of one thread after the other, and side by side; in inference mode and out of it."""
    tiles, x = [usual("nvfp4", ROWS, COLUMNS, seed=seed) for seed in range(4)], torch.randn(8, COLUMNS)
    with torch.inference_mode():
        first = DEQUANTIZE.linear(Activation(x.clone()), tiles[0], None)
    wanted = [DEQUANTIZE.linear(Activation(x), tile, None) for tile in tiles]
    same(first, wanted[0])
    found = [[] for _ in tiles]

    def repeat(at):
        found[at] += [DEQUANTIZE.linear(Activation(x), tiles[at], None) for _ in range(20)]

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(len(tiles))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, many in enumerate(found):
        assert len(many) == 20
        for one in many:
            same(one, wanted[at])

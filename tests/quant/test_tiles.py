"""The layout of tiles against its definition: every tile is fp8 x its own scale, whatever the host does with it."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.quant.codecs import codecs
from quantized_transformers.quant.formats import identify
from quantized_transformers.quant.kernels import comfy_kitchen
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.layouts.stored import FORMAT as TILES
from quantized_transformers.quant.layouts.tiled import TilesLayout, tiles_of
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.stored import ByteOrder
from quantized_transformers.quant.tile import Place, Tile
from support.common import header_of
from support.tiles import usual

pytestmark = pytest.mark.unit

E4M3 = torch.float8_e4m3fn
ROWS, COLUMNS = (32, 48, 16), 64
NATIVE = "float8_e4m3fn"


def fuse(names, parts, **options):
    """What a load does with the stored parts of one module."""
    tiles, row = [], 0
    for name, part in zip(names, parts, strict=True):
        for tile in identify(header_of(part)).coded(name, part, ByteOrder()).tiles:
            tiles.append(tile.at(row))
            row += tile.place.rows
    return join(tiles, names, (row, COLUMNS), **options)


@pytest.mark.parametrize("name", codecs())
def test_every_codec_says_what_its_numbers_may_be(name):
    """All floats of a tile but codes (and what goes through as it is, a bias) have a rule, which finds what it forbids."""
    kind = codecs()[name]
    if kind.deep:
        return  # tests/families/gguf/test_damaged_scales.py
    tile = usual(name, 128, 512, groups=8)
    rules = {field: rule.values for field, rule in kind.fields.items()}
    assert kind.damage(tile) is None
    floats = {field for field, rule in kind.fields.items() if "float" in rule.dtypes[0] and field not in ("codes", "bias")}
    assert floats <= {field for field, values in rules.items() if values}
    for field, values in rules.items():
        if not values or field not in tile.fields:
            continue
        whole = tile[field].clone()
        (whole.view(torch.uint8) if whole.element_size() == 1 else whole).view(-1)[-1] = \
            torch.nan if whole.element_size() > 1 else 0x7F if whole.is_floating_point() else 255
        assert kind.damage(tile.having(**{field: whole})) == (field, "NaN", values)


def stored(rows: int, scale: float, seed: int, input_scale: float | None = 0.01) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    part = {"weight": (torch.randn(rows, COLUMNS, generator=g) * 100).clamp(-448, 448).to(E4M3),
            "weight_scale": torch.tensor(scale), "bias": torch.randn(rows, generator=g)}
    if input_scale is not None:
        part["input_scale"] = torch.tensor(input_scale)
    return part


def parts(input_scale: float | None = 0.01) -> list[dict[str, torch.Tensor]]:
    return [stored(rows, 0.001 * (i + 1), i, input_scale) for i, rows in enumerate(ROWS)]


def by_definition(shards: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([p["weight"].to(dtype) * p["weight_scale"].to(dtype) if "weight_scale" in p else
                      p["weight"].to(dtype) for p in shards])


def linear(shards: list[dict[str, torch.Tensor]], dtype: torch.dtype = torch.float32, **fuse_options):
    """A Linear of the host's mixed-precision operations with the shards loaded, as a checkpoint load does it."""
    import comfy.ops

    fused = fuse([f"part{i}" for i in range(len(shards))], shards, **fuse_options)
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype), {"fp8": "comfy_kitchen"})
    rows = sum(p["weight"].shape[0] for p in shards)
    module = operations.Linear(COLUMNS, rows, bias=True, device="cpu", dtype=dtype)
    bias = torch.cat([p["bias"] for p in shards]).to(dtype)
    missing, unexpected = module.load_state_dict({**fused.tensors, "bias": bias}, strict=False)
    assert not missing and not unexpected
    return module, fused


def activations(tokens: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(9)).to(dtype)


def emulate(x: torch.Tensor, shards, scale: torch.Tensor) -> torch.Tensor:
    codes = (x.float() / scale).clamp(-448, 448).to(E4M3).float() * scale
    return torch.nn.functional.linear(codes, by_definition(shards), torch.cat([p["bias"] for p in shards]))


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture()
def cpu_gemm(monkeypatch):
    """torch.nn.functional.scaled_mm has no CPU kernel, its predecessor torch._scaled_mm has: use that one."""
    calls = []

    def scaled_mm(x, w, scale_a, scale_b, bias=None, out_dtype=None):
        calls.append(tuple(w.shape))
        return torch._scaled_mm(x, w, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype)

    monkeypatch.setattr(comfy_kitchen, "scaled_mm_v2", scaled_mm)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizes_to_the_definition_exactly(dtype):
    module, fused = linear(parts(), dtype)
    assert fused.layout == TILES
    assert torch.equal(module.weight.dequantize(), by_definition(parts(), dtype))


def test_shards_stay_the_views_they_came_as():
    shards = parts()
    module, _ = linear(shards)
    loaded = [tile["codes"] for tile in tiles_of(module.weight)]
    assert [t.data_ptr() for t in loaded] == [p["weight"].data_ptr() for p in shards]


def test_equal_scales_take_the_hosts_layout():
    shards = [stored(rows, 0.002, i) for i, rows in enumerate(ROWS)]
    module, fused = linear(shards)
    assert fused.layout == NATIVE and module.layout_type == "TensorCoreFP8E4M3Layout"
    assert torch.equal(module.weight.dequantize(), by_definition(shards))


def test_static_gemm_per_shard(cpu_gemm):
    module, _ = linear(parts())
    with torch.inference_mode():
        out = module(activations())
    assert cpu_gemm == [(COLUMNS, rows) for rows in ROWS]  # one GEMM a shard, on transposed views
    assert rel(out, emulate(activations(), parts(), torch.tensor(0.01))) < 1e-6


def test_dynamic_scale_is_amax_over_448_and_never_one(cpu_gemm):
    shards = parts(input_scale=None)
    module, fused = linear(shards)
    assert fused.dynamic and not any("input_scale" in tile.fields for tile in tiles_of(module.weight))
    x = activations() * 1000  # a scale of 1.0 would clip at 448
    with torch.inference_mode():
        out = module(x)
    assert len(cpu_gemm) == 3 and rel(out, emulate(x, shards, x.abs().max() / 448)) < 1e-6


def test_one_shard_without_input_scale_is_dynamic_too(cpu_gemm):
    shards = parts(input_scale=None)[:1]
    module, fused = linear(shards)
    assert fused.layout == TILES and fused.dynamic
    with torch.inference_mode():
        out = module(activations())
    assert rel(out, emulate(activations(), shards, activations().abs().max() / 448)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_activations_give_the_bias(dtype, cpu_gemm):
    shards = parts(input_scale=None)
    module, _ = linear(shards, dtype)
    with torch.inference_mode():
        out = module(torch.zeros(16, COLUMNS, dtype=dtype))
    assert torch.equal(out, torch.cat([p["bias"] for p in shards]).to(dtype).expand(16, -1))


def test_no_gemm_on_this_device_multiplies_dequantized():
    module, _ = linear(parts())  # scaled_mm has no CPU kernel
    with torch.inference_mode():
        out = module(activations())
    assert rel(out, emulate(activations(), parts(), torch.tensor(0.01))) < 1e-6


def test_three_dimensional_input_outside_inference_mode(cpu_gemm):
    module, _ = linear(parts())
    x = activations(16).reshape(2, 8, COLUMNS)
    with torch.no_grad():
        out = module(x)  # arrives as t + addmm
    assert out.shape == (2, 8, sum(ROWS)) and len(cpu_gemm) == 3
    assert rel(out.reshape(16, -1), emulate(activations(16), parts(), torch.tensor(0.01))) < 1e-6


def test_t_and_mm(cpu_gemm):
    module, _ = linear(parts())
    out = torch.mm(activations(), module.weight.t())
    expected = emulate(activations(), parts(), torch.tensor(0.01)) - torch.cat([p["bias"] for p in parts()])
    assert len(cpu_gemm) == 3 and rel(out, expected) < 1e-6
    assert torch.equal(module.weight.t().dequantize(), by_definition(parts()).t())
    assert torch.equal(module.weight.t().t().dequantize(), by_definition(parts()))


def test_dequantize_choice_leaves_activations_alone():
    module, fused = linear(parts(), full_precision=True)
    assert not fused.dynamic
    with torch.inference_mode():
        out = module(activations())
    exact = torch.nn.functional.linear(activations(), by_definition(parts()), torch.cat([p["bias"] for p in parts()]))
    assert rel(out, exact) < 1e-6


def test_a_plain_shard_keeps_its_precision():
    shards = parts()
    shards[1] = {"weight": torch.randn(48, COLUMNS).to(torch.bfloat16), "bias": shards[1]["bias"]}
    module, fused = linear(shards)
    assert "partly quantized group" in fused.notes[0]
    assert torch.equal(module.weight.dequantize(), by_definition(shards))
    with torch.inference_mode():
        out = module(activations())
    exact = torch.nn.functional.linear(activations(), by_definition(shards), torch.cat([p["bias"] for p in shards]))
    assert rel(out, exact) < 1e-6


def test_different_input_scales_take_the_largest_and_say_so():
    shards = parts()
    shards[2]["input_scale"] = torch.tensor(0.05)
    module, fused = linear(shards)
    assert float(tiles_of(module.weight)[0]["input_scale"]) == pytest.approx(0.05) and "different input scales" in fused.notes[0]
    del shards[2]["input_scale"]
    _, fused = linear(shards)
    assert fused.dynamic and "dynamic for all" in fused.notes[0]


def test_clones_and_copies_share_nothing():
    module, _ = linear(parts())
    weight = module.weight
    for copy in (weight.clone(), weight.to(torch.device("cpu"), copy=True)):
        for mine, theirs in zip(TilesLayout.get_plain_tensors(weight),
                                TilesLayout.get_plain_tensors(copy), strict=True):
            assert mine.data_ptr() != theirs.data_ptr() and torch.equal(mine.float(), theirs.float())
    target = torch.empty_like(weight)
    target.copy_(weight)
    assert torch.equal(target.dequantize(), by_definition(parts()))
    assert torch.equal(weight.to(torch.bfloat16).dequantize(), by_definition(parts(), torch.bfloat16))


def test_the_hosts_streaming_buffer_round_trip():
    """What dynamic VRAM does: all inner tensors gathered in one byte buffer and read back as a weight."""
    import comfy.memory_management as memory

    module, _ = linear(parts())
    buffer = torch.zeros(memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8)
    weight, bias = memory.interpret_gathered_like([module.weight, module.bias], buffer)
    weight.copy_(module.weight)
    bias.copy_(module.bias)
    assert torch.equal(weight.dequantize(), by_definition(parts())) and torch.equal(bias, module.bias)


def test_patched_weights_requantize_shard_by_shard():
    """A baked save: scales are each shard's own amax / 448."""
    module, _ = linear(parts())
    patched = by_definition(parts())
    patched[:32] *= 50  # only the first shard grows; the others must not lose precision to it
    weight = module.weight.requantize_from_float(patched.clone(), stochastic_rounding=1)
    scales = torch.stack([tile["scale"] for tile in tiles_of(weight)])
    amax = torch.stack([p.abs().max() for p in patched.split(list(ROWS))])
    assert torch.allclose(scales, amax / 448, rtol=1e-6)
    # stochastic rounding moves a value by less than one step: 2^-3 of itself, or a subnormal step
    for now, was, scale in zip(weight.dequantize().split(list(ROWS)), patched.split(list(ROWS)), scales,
                               strict=True):
        assert ((now - was).abs() <= was.abs() / 8 + 2 ** -9 * scale).all()


def test_state_dict_round_trip():
    module, _ = linear(parts())
    again, _ = linear(parts())
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    again.weight = None
    again.load_state_dict(saved)
    assert torch.equal(again.weight.dequantize(), by_definition(parts()))
    for mine, theirs in zip(tiles_of(again.weight), tiles_of(module.weight), strict=True):
        assert mine.place == theirs.place and torch.equal(mine["input_scale"], theirs["input_scale"])
    assert torch.equal(again.bias, module.bias)


def test_more_tensors_than_the_host_moves_are_refused():
    with pytest.raises(ValueError, match="part0, part1.* of 41 tensors; at most 32 are supported"):
        fuse([f"part{i}" for i in range(20)], [stored(16, 0.1 + i, i) for i in range(20)])


def test_tiles_beside_each_other_of_other_heights():
    """Two on the left, one below the other, and one on the right as high as both."""
    import comfy.ops

    places = ((0, 0, 16, 32), (16, 0, 32, 32), (0, 32, 48, 32))
    tiles, dense = [], torch.zeros(48, 64)
    for i, (row, column, rows, columns) in enumerate(places):
        codes = stored(rows, 1.0, i)["weight"][:, :columns].contiguous()
        tiles.append(Tile(Place("fp8", rows, columns, row, column), {"codes": codes, "scale": torch.tensor(0.1 + i)}))
        dense[row:row + rows, column:column + columns] = codes.float() * (0.1 + i)
    made = join(tiles, ["a", "b", "c"], (48, 64)).tensors
    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32))
    module = operations.Linear(64, 48, bias=True, device="cpu", dtype=torch.float32)
    bias = torch.randn(48)
    module.load_state_dict({**made, "bias": bias})
    with torch.inference_mode():
        assert rel(module(activations()), torch.nn.functional.linear(activations(), dense, bias)) < 1e-6


def test_a_scale_that_tiles_have_in_common_is_one_tensor():
    module, fused = linear(parts())
    first, second, third = (tile["input_scale"] for tile in tiles_of(module.weight))
    assert first is second is third and sum("input_scale" in leaf for leaf in fused.tensors) == 1


def test_forced_casts_multiply_dequantized(cpu_gemm):
    """What the host's compute dtype does: activations stay as they are."""
    module, _ = linear(parts())
    module.comfy_force_cast_weights = True
    with torch.inference_mode():
        out = module(activations())
    exact = torch.nn.functional.linear(activations(), by_definition(parts()), torch.cat([p["bias"] for p in parts()]))
    assert not cpu_gemm and rel(out, exact) < 1e-6


@pytest.mark.parametrize("how", ["columns", "rows"])
def test_slices_of_three_dimensions_outside_inference_mode(how, cpu_gemm):
    module, _ = linear(parts())
    big = torch.randn(2, 9, 2 * COLUMNS, generator=torch.Generator().manual_seed(2))
    x = big[..., :COLUMNS] if how == "columns" else big[..., :COLUMNS].contiguous()[:, :8]
    with torch.inference_mode():
        expected = module(x.contiguous())
    with torch.no_grad():
        assert torch.equal(module(x), expected) and len(cpu_gemm) == 6


def test_dequantizing_leaves_the_tiles_alone():
    codes = torch.randn(8, 64)
    tile = Tile(Place("plain", 8, 64), {"codes": codes.clone(), "down": torch.ones(64, 1), "up": torch.ones(8, 1)})
    from quantized_transformers.quant.codecs import codec

    assert torch.equal(codec("plain").dequantize(tile, torch.float32), codes + 1)
    assert torch.equal(tile["codes"], codes)


def test_coded_again_where_the_new_weight_is():
    module, _ = linear(parts())
    again = module.weight.requantize_from_float(by_definition(parts()).to("meta"), inplace_ops=True)
    assert {tensor.device.type for tile in tiles_of(again) for tensor in tile.fields.values()} == {"meta"}
    assert len({id(tile["input_scale"]) for tile in tiles_of(again)}) == 1


@pytest.mark.parametrize(("parts", "swap"), [(("to_q", "to_k"), False), (("linear",), True)])
def test_padded_rows_do_not_shift_the_rows_of_others(parts, swap):
    """Rows that the host's kernels pad (24 -> 32) are kept where a layer is alone, and refused in a fused one, where the
    rows of the next part would lie below zeros."""
    from quantized_transformers.loaders.architectures import Module
    from quantized_transformers.loaders.assemble import Layers, NativeStateDict, Tensors, add
    from quantized_transformers.loaders.plan import Layer, Piece, Planned
    from quantized_transformers.quant.codecs.nvfp4 import NVFP4_FORMAT

    class Given(Tensors):
        def __init__(self):
            self.mapped, self.in_file = {}, str

        def take(self, layer):
            return {"weight": torch.zeros(32, 32, dtype=torch.uint8), "weight_scale_2": torch.tensor(1.0),
                    "weight_scale": torch.zeros(128, 4).to(torch.float8_e4m3fn)}

    def made(parts, swap):
        layers = [Layer(name, "NVFP4", ("weight",), read=lambda layer, part: [
            NVFP4_FORMAT.coded(layer.name, part, ByteOrder(False, True))]) for name in parts]
        module = Module("qkv", parts, (24,) * len(parts), (64,), bias=False, swap_halves=swap)
        native = NativeStateDict()
        add(native, Planned(module, tuple(Piece(x, 24, 0, 24 * i) for i, x in enumerate(layers))), Layers(Given()))
        return native.tensors

    assert made(("linear",), False)["qkv.weight"].shape == (32, 32)
    with pytest.raises(ValueError, match=f"{parts[0]} is padded to 32 rows, expected 24"):
        made(parts, swap)

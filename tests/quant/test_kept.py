"""Kept weights of a layer, in every format: bit by bit what it decodes, and used instead of decoding; in nothing that
outlives the run. tests/loaders/test_kept.py has whole models."""

from __future__ import annotations

import copy

import comfy.model_management
import comfy.ops
import comfy.weight_adapter
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from quantized_transformers.quant import kept
from quantized_transformers.quant.codecs import codec, codecs
from quantized_transformers.quant.kernels import by_tiles, kernel, kernels
from quantized_transformers.quant.kernels.triton import definition
from quantized_transformers.quant.layouts import stored
from quantized_transformers.quant.layouts.tiled import (
    is_tiled,
    parameter,
    params_of,
    plain_bias,
    tiles_of,
    with_delta,
    with_tiles,
)
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from support import patch_net
from support.tiles import usual

pytestmark = pytest.mark.unit

OF_THE_HOST = ("fp8 e5m2", "convrot w4a4")  # which no codec of this pack has, so that the host decodes them
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def as_the_server_runs_nodes():
    with torch.inference_mode():
        yield


def seen(layer, x):
    """What the layer gives for x while it is only looked at, and what it keeps then."""
    layer.kept = one = kept.Kept()
    out = layer(x)
    assert one.like.shape == (x.numel() // x.shape[-1], 0) and one.like.dtype == x.dtype
    return out, one


def activations(columns: int, dtype=F32) -> torch.Tensor:
    return patch_net.rand(2, 8, columns, seed=9).to(dtype)


def bound(x, weight, bias, out):
    """Sums of F32 products in any order, and roundings of the result (and of a low-rank product) to the dtype."""
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    return size * (x.shape[-1] + 8) * 2.0 ** -23 + (0 if out.dtype == F32 else torch.finfo(out.dtype).eps * out.double().abs())


def refuse(*args, **kwargs):
    raise AssertionError("decoded again")


@pytest.fixture
def nothing_decodes(monkeypatch):
    """Call it, and from then on no codec, and no weight of the host's, decodes."""
    def stop() -> None:
        for name, kind in codecs().items():
            if name != "plain":
                for method in ("decode_rows", "residual", "dequantize"):
                    monkeypatch.setattr(kind, method, refuse)
        monkeypatch.setattr(QuantizedTensor, "dequantize", refuse)
    return stop


@pytest.mark.parametrize("dtype, units", [(F32, False), *((dtype, units) for dtype in (BF16, F16) for units in (False, True))])
@pytest.mark.parametrize("name", patch_net.FORMATS)
def test_every_format(name, dtype, units, nothing_decodes, monkeypatch):
    monkeypatch.setattr(by_tiles, "has_units", lambda dtype: units)
    patcher, _, columns = patch_net.make(name)
    layer, x = patcher.model.diffusion_model.layer, activations(columns, dtype)
    plain, one = seen(layer, x)
    shifted = is_tiled(layer.weight) and any(codec(p.codec).shifts for p in layer.weight._params.tiles)
    assert kept.can_keep(layer, one.like) == (dtype == F32 or not shifted or units and name != "svdq linear2")
    if not kept.can_keep(layer, one.like):
        return
    one.decode(layer)
    whole = layer.weight.to(F32).dequantize()
    for tile in tiles_of(one.weight):
        place = tile.place
        at = slice(place.row, place.row + place.rows), slice(place.column, place.column + place.columns)
        if is_tiled(layer.weight):
            own = next(one for one in tiles_of(layer.weight) if one.place[1:5] == place[1:5])
            wanted = codec(own.place.codec).residual(own, tile["codes"].dtype)
        else:  # by this pack, or by the host in the dtype of x
            wanted = whole[at] if tile["codes"].dtype == F32 else layer.weight.to(dtype).dequantize()
        atol = 256 * 2.0 ** -24 * 16 * float(wanted.abs().max()) if "convrot" in name else 0  # a product itself
        torch.testing.assert_close(tile["codes"], wanted, rtol=0, atol=atol)
    wide = tiles_of(one.weight)[0]["codes"].element_size()
    assert wide == (4 if by_tiles.takes(x) and name not in OF_THE_HOST else x.element_size())
    assert one.bytes == whole.numel() * wide <= kept.size_of(layer, one.like)
    nothing_decodes()
    out = layer(x)
    bias = plain_bias(layer.weight, layer.bias) if is_tiled(layer.weight) and dtype == F32 and not shifted else layer.bias
    limit = bound(x, whole, bias, plain) * (2 if "convrot" in name else 1)
    assert out.dtype == plain.dtype and ((out.double() - plain.double()).abs() <= limit).all()


def test_what_is_refused_above_would_decode(nothing_decodes):
    patcher, _, columns = patch_net.make("fp8 shards")
    nothing_decodes()
    with pytest.raises(AssertionError, match="decoded again"):
        patcher.model.diffusion_model.layer(activations(columns))


def layer_of(name: str, run: str = "", **options):
    """A Linear of one tile of this codec, by a kernel."""
    made = with_tiles_of(comfy.ops.mixed_precision_ops({}, F32)).Linear(128, 64)
    made.weight = parameter(*params_of([usual(name, 64, 128, **options)], F32, (64, 128), (run,)))
    made.quant_format = stored.FORMAT
    made.bias.data.fill_(1)
    return made


def test_kernels_that_multiply_codes_are_left_alone():
    like = torch.empty(4096, 0)
    for name, run in (("w8a8_dynamic", "reference"), ("w8a8_dynamic", "comfy_kitchen"), ("w4a8_dynamic", "reference"),
                      ("svdq_int4", "comfy_kitchen"), ("awq", "comfy_kitchen"), ("fp8", "comfy_kitchen"), ("nvfp4", "comfy_kitchen"),
                      ("wfp8afp8_dynamic", "reference"), ("svdq_int4", "nunchaku"), ("nvfp4", "flashinfer")):
        made = layer_of(name, run, groups=1)
        assert not kept.can_keep(made, like), (name, run)
    assert kept.can_keep(layer_of("w8a16", "comfy_kitchen"), like) and kept.can_keep(layer_of("w8a16", "reference"), like)
    ours = with_tiles_of(comfy.ops.mixed_precision_ops({}, F32)).Linear(128, 64)
    weight = QuantizedTensor.from_float(torch.randn(64, 128) / 20, "TensorWiseINT8Layout", per_channel=True)
    ours.load_state_dict({**weight.state_dict("weight"), "comfy_quant": marker({"format": "int8_tensorwise"}), "bias": torch.ones(64)})
    x = activations(128)
    before, one = seen(ours, x)
    assert not kept.can_keep(ours, one.like) and torch.equal(ours(x), before)


def test_every_kernel_says_whether_it_decodes():
    """Those that do give the decoded weight; no other kernel says so by accident."""
    like = torch.empty(4096, 0, dtype=BF16)
    found = {one.name: {name for name in one.codecs if one.decodes(name, like)} for one in kernels()}
    assert {name for name, codecs in found.items() if codecs} == {"triton", "comfy_kitchen", "reference", "torch_npu", "at_load"}
    assert found["triton"] == set(kernel("triton").codecs)
    assert not {"fp8", "nvfp4", "svdq_int4", "awq", "w8a8", "w8a8_dynamic", "w4a4_dynamic"} & found["comfy_kitchen"]
    assert found["reference"] == found["torch_npu"] == {"w8a16"}  # which no operator multiplies


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "u4_groups", "ggml_q4_k", "codebook", "svdq_nvfp4"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_tritons_weights_are_the_definition(name, dtype):
    run, tile = kernel("triton"), usual(name, 2048, 256, groups=8) if "ggml" not in name else None
    if tile is None:
        from support import gguf_files
        raw = torch.from_numpy(gguf_files.blocks(torch.randn(2048, 256) / 50, "Q4_K")[0])
        tile = kept.Tile(usual("fp8", 2048, 256).place._replace(codec=name), {"codes": raw})
    assert torch.equal(run.decoded(tile, torch.empty(4096, 0, dtype=dtype)), definition(tile, dtype))


def test_triton_decodes_few_rows_on_the_way():
    run = kernel("triton")
    for tokens, dtype, wanted in ((256, BF16, False), (257, BF16, True), (1, F16, False), (1, F32, True)):
        assert run.decodes("fp8", torch.empty(tokens, 0, dtype=dtype)) is wanted


def test_only_activations_such_as_were_seen():
    layer, x = layer_of("fp8_blocks"), activations(128)
    _, one = seen(layer, x)
    one.decode(layer)
    half = layer(x.to(BF16))
    one.weight = None
    assert torch.equal(layer(x.to(BF16)), half)  # decoded for these
    assert one.times(layer, torch.nn.Parameter(x.clone())) is None


def test_another_weight_is_not_the_kept_one():
    layer, x = layer_of("fp8_blocks"), activations(128)
    _, one = seen(layer, x)
    one.decode(layer)
    other = layer_of("fp8_blocks", seed=1)
    wanted = other(x)
    layer.weight = other.weight
    assert torch.equal(layer(x), wanted)


def test_cancel_between_layers_that_keep():
    layer, x = layer_of("fp8_blocks"), activations(128)
    _, one = seen(layer, x)
    one.decode(layer)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        layer(x)


def test_what_was_put_on_top_of_the_codes_stays():
    layer, x = layer_of("svdq_int4"), activations(128)
    without = layer(x)
    layer.weight = with_delta(layer.weight, patch_net.rand(64, 128, seed=5))
    plain, one = seen(layer, x)
    one.decode(layer)
    assert not torch.allclose(plain, without, atol=0.1)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_nothing_outlives_it():
    layer, x = layer_of("svdq_int4"), activations(128)
    names, state = [name for name, _ in layer.named_parameters()], layer.state_dict()
    _, one = seen(layer, x)
    one.decode(layer)
    assert [name for name, _ in layer.named_parameters()] == names and not list(layer.named_buffers())
    again = layer.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)
    twin = copy.deepcopy(layer)
    assert twin.kept is None and layer.kept is one and one.weight is not None
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-6)
    layer.to(torch.device("cpu"))  # as when the host lets go of a model
    assert layer.kept is None and one.weight is None and not one.bytes


def test_a_compiled_layer_is_left_alone():
    with torch.inference_mode(False), torch.no_grad():
        layer, x = layer_of("w8a16"), activations(128)
        layer.kept = one = kept.Kept()
        wanted = layer(x)
        one.like = None
        compiled = torch.compile(layer, backend="eager", fullgraph=False)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-6)
        assert one.like is None


@pytest.mark.parametrize("name", ["fp8", "nvfp4 shards", "svdq int4", "int8 convrot"])
def test_a_lora_stays_beside_it(name, nothing_decodes):
    patcher, _, columns = patch_net.make(name)
    pair, layer, x = patch_net.lora(columns), patcher.model.diffusion_model.layer, activations(columns)
    without = layer(x)
    lora = comfy.weight_adapter.LoRAAdapter(set(), (pair["up"], pair["down"], 4.0, None, None, None))
    patcher.add_patches({patch_net.KEY: lora})
    patcher.load(torch.device("cpu"), full_load=True)
    plain, one = seen(layer, x)
    assert float((plain - without).norm() / without.norm()) > 0.3
    one.decode(layer)
    nothing_decodes()
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_what_others_change_is_not_kept():
    like = torch.empty(64, 0)
    layer = layer_of("fp8_blocks")
    assert kept.can_keep(layer, like) and kept.resident(layer, like)
    layer.weight_function = [lambda weight: weight]
    assert not kept.can_keep(layer, like)
    layer.weight_function, layer._v = [], object()
    assert not kept.resident(layer, like)
    del layer._v
    low_rank = {"down": patch_net.rand(128, 4, seed=1), "up": patch_net.rand(64, 4, seed=2)}
    layer.weight = with_tiles(layer.weight, [tiles_of(layer.weight)[0].having(**low_rank)])
    layer.comfy_force_cast_weights = True  # a compute dtype of the MODEL's own
    x = activations(128)
    plain, one = seen(layer, x)
    one.decode(layer)
    assert torch.equal(one.weight._qdata, layer.weight.dequantize()) and tiles_of(one.weight)[0].fields.keys() == {"codes"}
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)

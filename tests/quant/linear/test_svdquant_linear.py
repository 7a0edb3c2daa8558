"""The SVDQuant Linear against its definition (docs/sources/nunchaku.md, "Arithmetic" and "Unsigned activations"),
written in support/svdquant.py."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.quant.layouts import tiled
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.svdquant.packed import part_of as natural
from quantized_transformers.quant.svdquant.parts import awq_part
from quantized_transformers.quant.svdquant.weights import residual
from support.svdquant import SHIFT, awq, interleave, rel, w4a4
from support.svdquant_net import by, inputs, linear, linear_of, native_tensors, part_of, placed, run

pytestmark = pytest.mark.unit

LAYERS = {"int4": lambda: w4a4(192, 320, 48), "unsigned": lambda: w4a4(192, 320, 32, unsigned=True),
          "nvfp4": lambda: w4a4(192, 320, 32, "nvfp4"), "nvfp4 channels": lambda: w4a4(200, 320, 32, "nvfp4",
                                                                                     channel_scales=True),
          "awq": lambda: awq(192, 640)}


def stacked():
    """FLUX linear1: two layers with a common input, one above the other."""
    a, b = w4a4(192, 256, 32, seed=1), w4a4(256, 256, 16, seed=2)
    tensors = native_tensors("x", [part_of(a)[0], placed(part_of(b)[0], 192, 0)],
                             torch.cat([part_of(a)[1], part_of(b)[1]]), (448, 256))
    return tensors, (448, 256), lambda x: torch.cat([a.forward(x), b.forward(x)], 1), torch.cat([a.weight, b.weight]), \
        torch.cat([a.bias, b.bias]).float()


def beside(kind="int4"):
    """FLUX linear2: two layers side by side, the second one unsigned (INT4); outputs and biases add."""
    a, b = w4a4(192, 128, 32, kind, seed=1), w4a4(192, 256, 16, kind, unsigned=kind == "int4", seed=2)
    a.bias, b.bias = a.bias.float(), b.bias.float()
    tensors = native_tensors("x", [part_of(a)[0], placed(part_of(b)[0], 0, 128)], a.bias + b.bias, (192, 384))
    return tensors, (192, 384), lambda x: a.forward(x[:, :128]) + b.forward(x[:, 128:]), \
        torch.cat([a.weight, b.weight], 1), a.plain_bias + b.plain_bias


@pytest.mark.parametrize("which", ["int4", "unsigned"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)])
def test_int4_with_quantized_activations(which, dtype, limit):
    layer = LAYERS[which]()
    x = inputs(320, dtype=dtype)
    assert rel(run(linear(layer, dtype=dtype), x), layer.forward(x)) < limit


@pytest.mark.parametrize("which", LAYERS)
def test_dequantizes_to_the_definition(which):
    layer = LAYERS[which]()
    weight = linear(layer).weight
    assert weight.shape == layer.codes.shape and rel(weight.dequantize(), layer.weight) < 1e-6
    part = natural(tiled.tiles_of(weight)[0])
    exact = layer.residual if layer.kind == "awq" else layer.residual / layer.smooth.float()
    found = residual(part)
    if layer.kind == "awq":  # z + 8 s is rounded once
        assert rel(found, exact) < 1e-6
    else:
        assert float((found - exact).abs().max()) == 0.0


@pytest.mark.parametrize(("backend", "which"), [
    *(("dequantize", which) for which in LAYERS), *(("comfy_kitchen", w) for w in ("nvfp4", "nvfp4 channels", "awq"))])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_dequantized_matmul(which, backend, dtype, limit):
    """The back end "dequantize", and comfy_kitchen where the device has no kernel: AWQ, and NVFP4 the host disabled."""
    layer = LAYERS[which]()
    x = inputs(layer.codes.shape[1], dtype=dtype)
    module = linear(layer, backend=backend, dtype=dtype, disabled={"nvfp4"})
    assert rel(run(module, x), x.float() @ layer.weight.t() + layer.plain_bias) < limit


def test_unsigned_layers_have_no_constant_offset_when_dequantized():
    """Against a float Linear whose residual deepcompressor's shift was taken from: b_stored = b - residual * shift."""
    layer = w4a4(192, 320, 32, unsigned=True)
    bias = torch.randn(192)
    stored = bias - SHIFT * (layer.residual / layer.smooth.float()).sum(1)
    part, _, shape = part_of(layer)
    module = linear_of(native_tensors("x", [part], stored, shape), shape, backend="dequantize")
    x = inputs(320)
    offset = (run(module, x) - (x @ layer.weight.t() + bias)).mean(0)
    assert float(offset.abs().max()) < 1e-5 and float((stored - bias).abs().mean()) > 0.05  # it is what makes it right
    module = linear(layer, backend="dequantize", dtype=torch.bfloat16)
    y = run(module, x.bfloat16()).float()
    assert float((y - (x.bfloat16().float() @ layer.weight.t() + layer.plain_bias)).mean().abs()) < 1e-3


@pytest.fixture()
def cpu_nvfp4(monkeypatch):
    """The host's NVFP4 GEMM has no CPU kernel: multiply what it would be given, decoded."""
    import comfy_kitchen as ck

    calls = []

    def gemm(a, b, tensor_scale_a, tensor_scale_b, block_scale_a, block_scale_b, bias=None, out_dtype=None, alpha=None):
        calls.append(tuple(b.shape))
        left = ck.dequantize_nvfp4(a, tensor_scale_a, block_scale_a, torch.float32)
        right = ck.dequantize_nvfp4(b, tensor_scale_b, block_scale_b, torch.float32)
        return (left @ right.t()).to(out_dtype)

    monkeypatch.setattr(ck, "scaled_mm_nvfp4", gemm)
    return calls


@pytest.mark.parametrize("which", ["nvfp4", "nvfp4 channels"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_nvfp4_with_quantized_activations(which, dtype, limit, cpu_nvfp4):
    """The rule named in run.py: block scale amax / 6 as E4M3, tensor scale 1, codes from the rounded scale."""
    layer = LAYERS[which]()
    x = inputs(320, dtype=dtype)
    assert rel(run(linear(layer, dtype=dtype), x), layer.forward(x)) < limit
    assert cpu_nvfp4 == [(-(-layer.codes.shape[0] // 16) * 16, 160)]


@pytest.mark.parametrize("make", [stacked, beside])
def test_two_parts(make):
    tensors, shape, forward, weight, plain_bias = make()
    x = inputs(shape[1])
    module = linear_of(tensors, shape)
    assert rel(run(module, x), forward(x)) < 1e-5
    with torch.no_grad():
        assert torch.equal(module(x.view(1, 17, -1))[0], run(module, x))  # three dimensions, taken apart into t and addmm
    assert rel(module.weight.dequantize(), weight) < 1e-6
    assert rel(run(linear_of(tensors, shape, "dequantize"), x), x @ weight.t() + plain_bias) < 1e-5


def test_two_nvfp4_parts(cpu_nvfp4):
    tensors, shape, forward, *_ = beside("nvfp4")
    x = inputs(shape[1])
    assert rel(run(linear_of(tensors, shape), x), forward(x)) < 1e-5 and len(cpu_nvfp4) == 2


def test_any_number_of_rows_through_awq():
    layer = awq(192, 640)
    module, x = linear(layer), inputs(640, 17)
    together = run(module, x)
    alone = torch.cat([run(module, row[None]) for row in x])
    assert rel(together, alone) < 1e-6 and rel(together, x @ layer.residual.t() + layer.bias.float()) < 1e-5


@pytest.mark.parametrize("vectors", [3, 6])
def test_modulation_runs_in_the_hosts_order(vectors):
    layer, shape = awq(vectors * 64, 128), (vectors * 64, 128)
    layer.bias.clamp_(-1, 0.99)
    part, bias = awq_part(interleave(layer, vectors), *shape, interleaved=vectors)
    x = inputs(128)
    out = run(linear_of(native_tensors("x", [part], bias, shape), shape), x)
    rounding = 2 ** -8  # half a BF16 step between 1 and 2, where the stored bias with its 1 may lie
    assert float((out - (x @ layer.residual.t() + layer.bias.float())).abs().max()) < rounding + 1e-5


def test_an_odd_dtype_and_no_bias():
    layer = LAYERS["int4"]()
    part, _, shape = part_of(layer)
    module = linear_of(native_tensors("x", [part], None, shape), shape, bias=False)
    x = inputs(320)
    assert rel(run(module, x), layer.forward(x) - layer.bias.float()) < 1e-5
    assert run(linear(layer), x.bfloat16()).dtype == torch.bfloat16  # other activations than the model's dtype


def test_full_precision_matmul_of_the_host_dequantizes():
    layer = LAYERS["int4"]()
    module = linear(layer, full_precision_mm=True)
    x = inputs(320)
    assert rel(run(module, x), x @ layer.weight.t() + layer.plain_bias) < 1e-5


def test_unconverted_tensors_are_refused():
    """Raw nunchaku tensors have the shapes of converted ones and would give noise."""
    layer = w4a4(256, 256, 16)
    part, bias, shape = part_of(layer)
    good = native_tensors("x", [part], bias, shape)
    raw = {"x.weight": layer.leaves["qweight"].view(torch.int8), "x.weight_t0_scale": layer.leaves["wscales"]}
    with pytest.raises(ValueError, match="unconverted tensors are not what"):
        linear_of({**good, **raw}, shape)
    from quantized_transformers.quant.marker import marker
    with pytest.raises(ValueError, match="not converted by this pack"):
        linear_of({**good, "x.comfy_quant": marker({"format": "qt.tiles"})}, shape)
    with pytest.raises(ValueError, match="weight is missing"):
        linear_of({k: v for k, v in good.items() if k != "x.weight"}, shape)
    with pytest.raises(ValueError, match=r"smooth is missing"):
        linear_of({k: v for k, v in good.items() if k != "x.weight_t0_smooth"}, shape)
    with pytest.raises(ValueError, match="do not make a weight"):
        linear_of(good, (512, 256))
    with pytest.raises(ValueError, match="kernel 'fast' is none of"):
        linear_of(good, shape, backend="fast")


def test_other_layers_go_to_the_host():
    import comfy.ops

    operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32), by("comfy_kitchen"))
    module = operations.Linear(64, 32, device="cpu", dtype=torch.float32)
    weight = torch.randn(32, 64)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(32)})
    assert torch.equal(run(module, inputs(64)), torch.nn.functional.linear(inputs(64), weight))


def everything(backend="comfy_kitchen"):
    yield "stacked", linear_of(*stacked()[:2], backend), 256
    yield "beside", linear_of(*beside()[:2], backend), 384
    for name, make in LAYERS.items():
        yield name, linear(make(), backend=backend, disabled={"nvfp4"}), make().codes.shape[1]


def same(a, b) -> bool:
    """Whether two weights hold the same bytes and constants."""
    mine, theirs = (tiled.TilesLayout.get_plain_tensors(t) for t in (a, b))
    return len(mine) == len(theirs) and a._params.tiles == b._params.tiles \
        and all(x.dtype == y.dtype and torch.equal(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x,
                                                   y.view(torch.uint8) if y.dtype == torch.float8_e4m3fn else y)
                for x, y in zip(mine, theirs, strict=True))


def test_a_saved_file_loads_again(tmp_path):
    for name, module, columns in everything():
        path = str(tmp_path / "saved.safetensors")
        save_file({f"x.{k}": v.contiguous() for k, v in module.state_dict().items()}, path)
        again = linear_of(load_file(path), tuple(module.weight.shape), disabled={"nvfp4"})
        assert same(again.weight, module.weight), name
        assert torch.equal(run(again, inputs(columns)), run(module, inputs(columns))), name


def test_copies_casts_and_moves():
    for name, module, columns in everything():
        x, before = inputs(columns), run(module, inputs(columns))
        for other in (copy.deepcopy(module), copy.deepcopy(module).to("cpu", torch.bfloat16).to(torch.float32)):
            assert same(other.weight, module.weight), name
            mine, theirs = (tiled.TilesLayout.get_plain_tensors(m.weight) for m in (module, other))
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(mine, theirs, strict=True) if a.numel()), name
        assert torch.equal(run(copy.deepcopy(module), x), before), name
        assert module.weight.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
        target = torch.empty_like(module.weight)
        target.copy_(module.weight)
        assert same(target, module.weight), name
        assert module.weight.to("meta").is_meta


def test_the_hosts_streaming_buffer_round_trip():
    """What dynamic VRAM does: all inner tensors gathered in one byte buffer and read back as a weight."""
    import comfy.memory_management as memory

    for name, module, _ in everything():
        buffer = torch.zeros(memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8)
        weight, bias = memory.interpret_gathered_like([module.weight, module.bias], buffer)
        weight.copy_(module.weight)
        bias.copy_(module.bias)
        assert same(weight, module.weight) and torch.equal(bias, module.bias), name
        every = tiled.TilesLayout.get_plain_tensors(module.weight)
        assert buffer.numel() >= sum(t.nbytes for t in every)  # nothing large is left out of the accounting


def test_module_size_counts_everything():
    import comfy.model_management

    module = linear(LAYERS["int4"]())
    size = sum(t.nbytes for t in (*tiled.TilesLayout.get_plain_tensors(module.weight), module.bias))
    assert comfy.model_management.module_size(module) >= size


def test_gradients_reach_the_input():
    """LoRA training: straight through the effective weight."""
    layer = LAYERS["int4"]()
    module, x = linear(layer), inputs(320).requires_grad_()
    module(x).sum().backward()
    assert rel(x.grad[0], layer.weight.sum(0)) < 1e-5


@pytest.mark.parametrize("which", ["int4", "awq"])
def test_compiles(which):
    """By the trivial back end: what dynamo and AOT make of the layout, without a C++ compiler."""
    layer = LAYERS[which]()
    module, x = linear(layer), inputs(layer.codes.shape[1])
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        assert rel(compiled(x), run(module, x)) < 1e-6

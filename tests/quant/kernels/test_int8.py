"""INT8 products on processors without instructions for them: the integers, and what comfy-kitchen makes of them."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from quantized_transformers.quant.ascend import integers
from quantized_transformers.quant.kernels import int8, kernel
from quantized_transformers.quant.kernels.base import Activation
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from support.tiles import usual

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("m, k, n", [(1, 16, 1), (7, 1024, 300), (64, 1025, 256), (3, 4100, 513), (0, 32, 8)])
def test_sums_are_exact(m, k, n):
    a, b = (torch.randint(-128, 128, shape).to(torch.int8) for shape in ((m, k), (k, n)))
    a[:1], b[:, :1] = -128, -128  # the largest sums there are
    for right in (b, b.t().contiguous().t()):
        found = integers.matmul(a, right)
        assert found.dtype == torch.int32 and torch.equal(found.long(), a.long() @ b.long())


def test_both_ways_agree(monkeypatch):
    a, b = (torch.randint(-128, 128, shape).to(torch.int8) for shape in ((16, 512), (512, 96)))
    for found in (True, False):
        monkeypatch.setattr(int8, "has_instructions", lambda found=found: found)
        assert torch.equal(int8.product(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w4a8_dynamic"])
def test_comfy_kitchens_kernel(name, monkeypatch):
    tile, x, outs = usual(name, 96, 512), torch.randn(16, 512), []
    for found in (True, False):
        monkeypatch.setattr(int8, "has_instructions", lambda found=found: found)
        outs.append(kernel("comfy_kitchen").linear(Activation(x), tile, torch.ones(96)))
    assert torch.equal(*outs) and outs[0].abs().max() > 0


def layer(ops, **options):
    made = ops.Linear(512, 96)
    weight = QuantizedTensor.from_float(torch.randn(96, 512, generator=torch.Generator().manual_seed(1)) / 20,
                                        "TensorWiseINT8Layout", per_channel=True, **options)
    conf = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": 64} if options else {})}
    made.load_state_dict({**weight.state_dict("weight"), "bias": torch.linspace(-1, 1, 96), "comfy_quant": marker(conf)})
    return made


@pytest.mark.parametrize("found", [True, False], ids=["instructions", "none"])
@pytest.mark.parametrize("options", [{}, {"convrot": True, "convrot_groupsize": 64}], ids=["rows", "ConvRot"])
def test_a_layer_of_comfyuis(options, found, monkeypatch):
    """Bit by bit what ComfyUI itself computes, on whatever processor; rotated activations stay its own."""
    host = comfy.ops.mixed_precision_ops({}, torch.float32)
    stock, ours, calls = layer(host, **options), layer(with_tiles_of(host), **options), []
    monkeypatch.setattr(int8, "has_instructions", lambda: found)
    linear = int8.linear
    monkeypatch.setattr(int8, "linear", lambda *args: calls.append(args) or linear(*args))
    for shape, dtype in (((16, 512), torch.float32), ((2, 3, 512), torch.bfloat16)):
        x = (torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]).to(dtype)
        with torch.inference_mode():
            assert torch.equal(ours(x), stock(x))
    assert len(calls) == (0 if options else 2)


def test_the_probe():
    assert int8.has_instructions() in (True, False) and not int8.takes(torch.ones(2, 2, device="meta"), None)

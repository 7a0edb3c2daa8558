"""What a native kernel refuses is answered by the dequantized weight and said once, for every codec (quant/exact.py).

The kernels here are those of comfy-kitchen's dispatch table, of its functions, and of the engines that the other tests
stand in for; each is made to raise what real ones raise: torch 2.12's scaled matmuls ValueError ("Bias must be size 64
but got 48", "CPU does not support swizzle."), comfy-kitchen NoCapableBackendError, missing operators NotImplementedError.
"""

from __future__ import annotations

import logging

import pytest
import torch
from comfy_kitchen.exceptions import NoCapableBackendError
from comfy_kitchen.tensor import QuantizedTensor, base, get_layout_class

from quantized_transformers.quant import exact
from quantized_transformers.quant.marker import marker

pytestmark = pytest.mark.unit

LINEAR = torch.ops.aten.linear.default
HOST = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout",
        "int8_tensorwise": "TensorWiseINT8Layout"}
REFUSALS = [ValueError("Bias must be size 64 but got 48"), RuntimeError("no kernel image is available"),
            NotImplementedError("not on this device"), TypeError("unexpected argument"),
            NoCapableBackendError("scaled_mm_mxfp8", {})]


def loaded(word: str, rows: int = 48, columns: int = 64) -> tuple[torch.nn.Module, torch.Tensor]:
    """A Linear of the host's mixed operations with answers, of a random weight in the host's format; and its input."""
    import comfy.ops

    seed = torch.Generator().manual_seed(5)
    own = QuantizedTensor.from_float(torch.randn(rows, columns, generator=seed), HOST[word],
                                     **({} if word == "int8_tensorwise" else {"scale": "recalculate"}
                                        if word != "mxfp8" else {}))
    operations = exact.with_exact_answers(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32))
    module = operations.Linear(columns, rows, bias=True, device="cpu", dtype=torch.float32)
    missing, unexpected = module.load_state_dict(
        {**{name.replace("w", "weight", 1): tensor for name, tensor in own.state_dict("w").items()},
         "bias": torch.randn(rows, generator=seed), "comfy_quant": marker({"format": word})}, strict=False)
    assert not missing and not unexpected and module.weight._layout_cls == HOST[word]
    return module, torch.randn(7, columns, generator=seed)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(exact, "_said", set())


def run(module, x):
    with torch.inference_mode():
        return module(x)


def close(out, expected) -> bool:
    return bool((out - expected).norm() < 1e-6 * expected.norm())


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("word", HOST)
def test_the_hosts_matmul_refuses(word, error, monkeypatch, caplog):
    """The answer is that of the dequantized weight, with the activation as the host had quantized it before."""
    module, x = loaded(word)
    calls = []

    def refuses(*_):
        calls.append(1)
        raise error

    monkeypatch.setitem(base._LAYOUT_DISPATCH_TABLE[LINEAR], get_layout_class(HOST[word]), refuses)
    given = x if word == "int8_tensorwise" else QuantizedTensor.from_float(x, HOST[word]).dequantize()
    expected = torch.nn.functional.linear(given, module.weight.dequantize(), module.bias)
    with caplog.at_level(logging.WARNING):
        first, second = run(module, x), run(module, x)
    assert len(calls) == 2 and close(first, expected) and torch.equal(first, second)
    said, = (record.getMessage() for record in caplog.records if record.name == exact.__name__)
    assert said.startswith(f"{word}: the native kernel does not take this ({type(error).__name__}: ")


@pytest.mark.parametrize("word", ["float8_e4m3fn", "nvfp4", "mxfp8"])
def test_quantizing_the_activation_refuses(word, monkeypatch):
    module, x = loaded(word)
    monkeypatch.setattr(get_layout_class(HOST[word]), "quantize", classmethod(lambda *_, **__: 1 / 0))
    with pytest.raises(ZeroDivisionError):  # no refusal: a fault of somebody's
        run(module, x)

    def refuses(*_, **__):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(get_layout_class(HOST[word]), "quantize", classmethod(refuses))
    assert close(run(module, x), torch.nn.functional.linear(x, module.weight.dequantize(), module.bias))


def test_memory_that_ran_out_goes_to_the_host(monkeypatch):
    module, x = loaded("nvfp4")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(base._LAYOUT_DISPATCH_TABLE[LINEAR], get_layout_class(HOST["nvfp4"]), out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(module, x)


def test_a_wrong_shape_stays_an_error(caplog):
    module, x = loaded("mxfp8")
    with pytest.raises(RuntimeError, match="shapes"):
        run(module, x[:, :32])
    assert not [record for record in caplog.records if record.name == exact.__name__]


def test_operations_are_made_once():
    import comfy.ops

    once = exact.with_exact_answers(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32))
    assert exact.with_exact_answers(once) is once


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_svdquant_refuses(kind, monkeypatch, caplog):
    from quantized_transformers.quant.kernels import comfy_kitchen
    from support.svdquant import w4a4
    from support.svdquant_net import inputs, linear

    layer = w4a4(192, 320, 32, kind)
    module, x = linear(layer), inputs(320)

    def refuses(*_):
        raise ValueError("CPU does not support swizzle.")

    monkeypatch.setitem(comfy_kitchen.RUN, f"svdq_{kind}", refuses)
    expected = x @ layer.weight.t() + layer.bias
    assert float((run(module, x) - expected).norm() / expected.norm()) < 1e-5
    assert f"SVDQ {kind.upper()} by comfy-kitchen" in caplog.text


def test_an_ascend_backend_refuses(monkeypatch, caplog):
    from quantized_transformers.quant.kernels.torch_npu import TorchNPU
    from support import ascend
    from support.ascend_net import native, operations

    def refuses(*_):
        raise RuntimeError("call aclnnQuantMatmulV4 failed")

    monkeypatch.setattr(TorchNPU, "linear", refuses)
    part = ascend.make("W4A4_DYNAMIC", 48, 128)
    layer = native("W4A4_DYNAMIC", part)
    module = operations("torch_npu").Linear(128, 48, bias=True, device="cpu", dtype=torch.float32)
    module.load_state_dict(dict(layer.tensors), strict=False)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    weight = torch.from_numpy(ascend.decode("W4A4_DYNAMIC", part))
    assert close(run(module, x), torch.nn.functional.linear(x, weight, part["bias"]))
    assert "W4A4_DYNAMIC by torch_npu" in caplog.text


@pytest.mark.parametrize("how", ["dequantize", "reference"])
def test_the_host_does_not_multiply_int8_past_the_layer(how):
    """comfy.ops.linear_input_act, which ComfyUI 0.30 has for MiniMax and 0.33 for Wan and LTX, sends the host's INT8
    layout to comfy-kitchen without asking the Linear."""
    import comfy.ops

    from support import ascend
    from support.ascend_net import native, operations

    part = ascend.make("W8A8_DYNAMIC", 48, 128)
    layer = native("W8A8_DYNAMIC", part)
    conf = {"format": "int8_tensorwise"} | ({"full_precision_matrix_mult": True} if how == "dequantize" else {})
    backend = "comfy_kitchen" if how == "dequantize" else how
    module = operations(backend).Linear(128, 48, bias=True, device="cpu", dtype=torch.float32)
    module.load_state_dict({**layer.tensors, "comfy_quant": marker(conf)}, strict=False)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = comfy.ops.linear_input_act(module, x, "swiglu")
    activated = comfy.ops.INPUT_ACT_EAGER["swiglu"](x)
    weight = torch.from_numpy(ascend.decode("W8A8_DYNAMIC", part))
    expected = torch.nn.functional.linear(activated, weight, part["bias"]) if how == "dequantize" else \
        torch.from_numpy(ascend.forward("W8A8_DYNAMIC", part, activated))
    assert seen == [1] and close(out, expected)
    saved = module.state_dict()  # the host's format all the same
    assert bytes(saved["comfy_quant"].tolist()).startswith(b'{"format": "int8_tensorwise"')
    assert torch.equal(saved["weight"], part["weight"]) and saved["weight_scale"].shape == (48, 1)

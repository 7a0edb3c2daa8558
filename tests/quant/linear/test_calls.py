"""What a call of a quantized Linear does besides its product."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from quantized_transformers import host
from quantized_transformers.quant.layouts import stored
from quantized_transformers.quant.layouts.tiled import parameter, params_of
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from support.tiles import usual

pytestmark = pytest.mark.unit
COLUMNS, ROWS = 128, 64
LAYOUTS = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout"}


def layer(name: str, bias: bool = True):
    """A Linear of this codec, or in this format of the host's, which is off there as on a CPU."""
    ops = with_tiles_of(comfy.ops.mixed_precision_ops({}, torch.float32, disabled=["float8_e4m3fn"]))
    made = ops.Linear(COLUMNS, ROWS, bias=bias)
    if name in LAYOUTS:
        options = {"per_channel": True} if name == "int8_tensorwise" else {"scale": "recalculate"}
        weight = QuantizedTensor.from_float(torch.randn(ROWS, COLUMNS) / 20, LAYOUTS[name], **options)
        tensors = {**weight.state_dict("weight"), "comfy_quant": marker({"format": name})}
        made.load_state_dict({**tensors, **({"bias": torch.ones(ROWS)} if bias else {})})
        return made
    made.weight = parameter(*params_of([usual(name, ROWS, COLUMNS)], torch.float32, (ROWS, COLUMNS)))
    made.quant_format = stored.FORMAT
    if bias:
        made.bias.data.fill_(1)
    return made


@pytest.mark.parametrize("name", ["fp8", "w8a16", *LAYOUTS])
def test_cancel(name):
    """Between layers, as in ComfyUI's own."""
    made, x = layer(name), torch.randn(3, COLUMNS)
    comfy.model_management.interrupt_current_processing()
    with torch.inference_mode():
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            made(x)
        assert made(x).shape == (3, ROWS)


@pytest.mark.parametrize("name", ["fp8", "w8a16", *LAYOUTS])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_there_is_not_moved(name, bias):
    made = layer(name, bias)
    weight, found, done = host.fetch_weight(made, torch.empty(1, dtype=torch.bfloat16))
    assert weight is made.weight
    assert found is None if not bias else found.dtype == torch.bfloat16 and torch.equal(found.float(), made.bias)
    done(weight, found)


@pytest.mark.parametrize("name", ["fp8", "w8a16", *LAYOUTS])
def test_functions_of_others_see_the_weight(name):
    """Somebody's function that the host would call with the weight is called."""
    made, x, seen = layer(name), torch.randn(3, COLUMNS), []
    made.weight_function = [lambda weight: seen.append(weight.shape) or torch.zeros_like(weight)]
    with torch.inference_mode():
        assert torch.equal(made(x), made.bias.expand(3, ROWS))
    assert seen == [(ROWS, COLUMNS)]


def test_shapes():
    made, x = layer("fp8"), torch.randn(2, 3, 4, COLUMNS)
    with torch.inference_mode():
        assert torch.equal(made(x).reshape(-1, ROWS), made(x.reshape(-1, COLUMNS)))
        assert made(x[:0]).shape == (0, 3, 4, ROWS) and made(x[0, 0, 0]).shape == (ROWS,)

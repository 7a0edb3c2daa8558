"""Expert banks: the models of the host that have them (HiDream-I1, Hunyuan3D 2.1), each expert's Linears in every format.

Their experts are Linears of their own by ComfyUI's names, `experts.<number>.<...>`, and the router is a plain parameter. Each
expert's weight is held to the format's own formula (support/), the router and all else to the numbers in the file.
"""

from __future__ import annotations

import pytest

from support import experts, host_models
from support.experts import GGUF, MODELS, SLIM, TOOLS, check
from support.passthrough import load

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", TOOLS)
def test_experts(form, name, tmp_path):
    path, truth, weights = experts.by_tool(form, name, tmp_path)
    with host_models.detected(name):
        check(load(path, compute="dequantize"), truth, weights, *TOOLS[form][2:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", GGUF)
def test_experts_of_gguf(kind, name, tmp_path):
    path, truth, weights = experts.by_gguf(kind, name, tmp_path)
    with host_models.detected(name):
        check(load(path, compute="dequantize"), truth, weights, f"GGUF {kind}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", SLIM)
def test_experts_of_modelslim(kind, name, tmp_path, output):
    """As msmodelslim writes them, and as Save Quantized Model does."""
    from quantized_transformers.makers.save import save

    path, truth, weights = experts.by_modelslim(kind, name, tmp_path)
    with host_models.detected(name):
        loaded = load(path, compute="dequantize")
        check(loaded, truth, weights, kind)
        again = load(save(loaded.patcher, "experts", overwrite=True)[0], compute="dequantize")
    check(again, truth, weights, again.description.layers[min(weights).removesuffix(".weight")])

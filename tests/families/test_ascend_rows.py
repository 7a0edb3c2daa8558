"""The rows of SGLang's "Quantization on Ascend" that are no ModelSlim's, from a file to the operators that a stand-in for
torch_npu is asked for: a model with experts, one of whose tokens goes to few of them."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers import host
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.tile import Place, Tile
from support import experts, host_models
from support.experts import one_token
from support.fake_torch_npu import install
from support.gguf_files import blocks
from support.passthrough import load, weights

pytestmark = pytest.mark.parity

NAME = "Hunyuan3D 2.1"
WEIGHTS, DYNAMIC = {"npu_weight_quant_batchmatmul"}, {"npu_dynamic_quant", "npu_quant_matmul"}
ROWS = {"AWQ W4A16": WEIGHTS, "GPTQ W4A16": WEIGHTS, "GPTQ W8A16": WEIGHTS, "AutoRound W4A16": WEIGHTS,
        "AutoRound W8A16": WEIGHTS, "compressed-tensors W4A16": WEIGHTS, "compressed-tensors W8A8": DYNAMIC}


@pytest.fixture
def npu(monkeypatch):
    """An Ascend A2 with all operators."""
    fake = install(monkeypatch, soc=220)
    monkeypatch.setattr(host, "machine", lambda: host.Machine("npu", "Ascend 910B"))
    return fake


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_linear_layers(row, tmp_path, npu):
    """In BF16 each rounding is 2^-9: of scales, of what goes from layer to layer and of what is summed."""
    path, truth, names = experts.by_tool(row, NAME, tmp_path)
    with host_models.detected(NAME):
        loaded = load(path, dtype="bf16")
    assert "runs: torch_npu (chosen for this device) on Ascend 910B: torch_npu 2.14.0 on Ascend A2" in loaded.report
    bound = 2 ** -7 if ROWS[row] == WEIGHTS else 2 ** -6  # INT8 activations: half a 127th of the largest beside it
    assert one_token(loaded, truth, torch.bfloat16) < bound and set(npu.calls) == ROWS[row]
    found = weights(loaded.patcher.model.diffusion_model)
    assert not [key for key in names if not torch.equal(found[key], truth[key])]


def test_layers_that_the_operator_does_not_take_are_dequantized_and_named(tmp_path, npu):
    path, truth, names = experts.by_tool("GPTQ W4A16, act order", NAME, tmp_path)
    with host_models.detected(NAME):
        loaded = load(path, dtype="bf16")
    assert one_token(loaded, truth, torch.bfloat16) < 2 ** -6 and not npu.calls
    note, = (line for line in loaded.report.splitlines() if "in an order of their own" in line)
    assert f"the same of {len(names) - 1} more layers" in note and "dequantized for every matmul" in note


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gguf_is_dequantized_at_load(dtype, tmp_path, npu):
    """To the compute dtype, with one rounding of what gguf-py dequantizes."""
    path, truth, names = experts.by_gguf("Q4_0", NAME, tmp_path)
    with host_models.detected(NAME):
        loaded = load(path, dtype=dtype)
    lines = [line for line in loaded.report.splitlines() if "when they are loaded" in line]
    assert len(lines) == 1 and lines[0].startswith("GGUF Q4_0 runs: at_load (chosen for this device) on Ascend 910B: ")
    net, half = dict(loaded.patcher.model.diffusion_model.named_parameters()), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(type(net[key]) is torch.nn.Parameter and net[key].dtype == half for key in names)
    assert not [key for key in names if not torch.equal(net[key], truth[key].to(half))]
    assert one_token(loaded, truth, half) < 2 ** -6


def test_gguf_stays_in_blocks_where_that_is_asked_for(tmp_path, npu):
    path, truth, names = experts.by_gguf("Q8_0", NAME, tmp_path)
    with host_models.detected(NAME):
        experts.check(load(path, compute="dequantize"), truth, names, "GGUF Q8_0")


def test_gguf_is_dequantized_at_load_where_matmuls_are_in_full_precision():
    """As the host has them in text encoders."""
    import comfy.ops

    raw, meant = blocks(torch.randn(16, 64, generator=torch.Generator().manual_seed(2)), "Q8_0")
    kind = "ggml_q8_0"
    given = join([Tile(Place(kind, 16, 64), {"codes": torch.from_numpy(raw)})], ["p"], (16, 64)).tensors
    stock = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.bfloat16, full_precision_mm=True)
    module = with_tiles_of(stock, {kind: "at_load"}).Linear(64, 16, bias=False, device="cpu", dtype=torch.bfloat16)
    module.load_state_dict(dict(given))
    assert type(module.weight) is torch.nn.Parameter and torch.equal(module.weight, meant.bfloat16())

"""The tests' own packed text encoders against whole tiny ones that the tools made (tests/data/exports/text_packed)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from support import make_text_packed as tools
from support import text_packed
from support.common import rel_l2
from support.text_packed import FORMATS, RECORDS, hidden, record, write, write_file
from support.transformers_versions import parameters

pytestmark = pytest.mark.unit

# record -> (format, options)
CASES = {
    "gptq": ("gptq", {}), "awq": ("awq", {}), "ct_w4a16": ("ct_w4a16", {}), "ct_w8a8": ("ct_w8a8", {}),
    "ct_fp8_dynamic": ("ct_fp8_dynamic", {}), "ct_nvfp4": ("ct_nvfp4", {}), "ct_w8a8_qwen25vl": ("ct_w8a8", {}),
    "bnb_nf4": ("bnb_nf4", {}), "bnb_nf4_t5": ("bnb_nf4", {}), "bnb_int8": ("bnb_int8", {}),
    "bnb_nf4_double_qwen25vl": ("bnb_nf4", {"double": True}), "modelopt_fp8": ("modelopt_fp8", {}),
}
# Tools that round to nearest give most codes as the packers here do: the rest are a step away, as tools divide in BF16.
# auto-round searches for its scales: there the distance is that of two roundings to 4 bits.
SEARCHED = ("gptq", "awq")
SCALED = ("weight_scale", "SCB")


def source(case):
    return tools.t5() if "t5" in case else tools.qwen25vl() if "qwen25vl" in case else \
        tools.qwen3(128 if case in ("gptq", "awq", "ct_w4a16") else 64)


@pytest.mark.parametrize("case", CASES)
def test_folders_are_as_the_tools_save_them(case, tmp_path):
    kind, options = CASES[case]
    folder, states, weights = record(case)
    model = write(source(case), tmp_path / "made", kind, **options)
    theirs, ours = (load_file(str(at / "model.safetensors")) for at in (folder, tmp_path / "made"))
    # the length of the JSON in it depends on how numbers are printed
    shapes = [{name: (t.dtype, None if "quant_state" in name else t.shape) for name, t in part.items()} for part in (ours, theirs)]
    if case in SEARCHED:  # auto-round keeps a 16-bit model's dtype
        shapes = [{name: kind for name, kind in part.items() if "norm" not in name} for part in shapes]
    assert shapes[0] == shapes[1]
    for name, values in weights.items():
        assert rel_l2(parameters(model)[name], values.float()) < (0.16 if case in SEARCHED else 0.04), name
    assert states.shape == hidden(model).shape
    if case in SEARCHED:  # by one unpacking, which on the tool's own file gives back the weight that was packed
        for name, values in tools.independent(folder, case).items():
            assert rel_l2(values, source(case).get_submodule(name).weight.float()) < 0.15, name
        for name, values in tools.independent(tmp_path / "made", case).items():
            assert rel_l2(values, model.get_submodule(name).weight) < 1e-6, name
    for name in ours if case not in SEARCHED else ():
        # NVFP4: the tool gives q, k and v one global scale
        if "quant_state" in name or "global" in name or name.endswith("input_scale") or "weight_scale" in name and "nvfp4" in case:
            continue
        same = (ours[name].view(torch.uint8) == theirs[name].view(torch.uint8)).float().mean() if ours[name].ndim else 1
        assert same > 0.8, (name, same)
    claims = [json.loads((at / "config.json").read_text(encoding="utf-8"))["quantization_config"]
              for at in (tmp_path / "made", folder)]
    for claim in claims:
        claim["ignore"] = sorted(claim.get("ignore") or [])
    if case not in SEARCHED:  # those are auto-round's records, the config here is gptqmodel's and autoawq's
        assert claims[0] == claims[1]


@pytest.mark.parametrize("case", ["ct_w8a8", "ct_fp8_dynamic", "ct_w8a8_qwen25vl", "bnb_int8", "modelopt_fp8"])
def test_records_hold_together(case):
    """Of formats that say it all in a code and a scale: hidden states and weights are those of the file."""
    folder, states, weights = record(case)
    stored, model = load_file(str(folder / "model.safetensors")), source(case).float()
    parts = {text_packed.plain(name): module for name, module in model.named_modules()}
    for name in [name for name in stored if name.endswith(SCALED)]:
        layer, _, leaf = name.rpartition(".")
        step = stored[name].float()[:, None] / 127 if leaf == "SCB" else stored[name].float()
        parts[text_packed.plain(layer)].weight.data = (stored[f"{layer}.weight"].float() * step).bfloat16().float()
    for name, values in weights.items():
        # one rounding to BF16, more or less
        assert ((parameters(model)[name] - values).abs() <= 2.0 ** -7 * values.abs()).all(), name
    # where the tool multiplies in BF16: the same rounding, in a few sums
    assert rel_l2(hidden(model), states) < 2.0 ** -8


@pytest.mark.parametrize("kind", FORMATS)
def test_files_mean_the_model_that_is_returned(kind, tmp_path):
    """By the definitions of the formats, for what every packer here shares: codes times scales, in a layer of a model."""
    model = write(tools.qwen3(128), tmp_path / "made", kind)
    stored = load_file(str(tmp_path / "made" / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    weight, before = model.get_parameter(f"{name}.weight"), tools.qwen3(128).get_parameter(f"{name}.weight")
    assert 0 < rel_l2(weight, before.float()) < 0.15
    assert weight.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    leaves = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(name)}
    scale = leaves.get("weight_scale", leaves.get("weight_scale_inv"))
    if scale is not None and leaves.get("weight") is not None:
        assert torch.equal(leaves["weight"].float() * scale.float(), weight)


@pytest.mark.parametrize("kind", ("scaled_fp8", "int8_tensorwise"))
def test_comfyui_reads_the_single_files_so(kind, tmp_path):
    """The host's own state dict loading and dequantization."""
    import comfy.utils
    from comfy import ops

    model = write_file(tools.qwen3(64), tmp_path / "one.safetensors", kind)
    stored, metadata = comfy.utils.load_torch_file(str(tmp_path / "one.safetensors"), return_metadata=True)
    stored, metadata = comfy.utils.convert_old_quants(stored, "", metadata)
    mixed = ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    name = "model.layers.0.mlp.up_proj"
    layer = mixed.Linear(64, 96, bias=False, device="cpu", dtype=torch.float32)
    layer.load_state_dict({key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(name)})
    assert torch.equal(layer.weight.dequantize().float(), model.get_parameter(f"{name}.weight"))


def test_nunchakus_layer_is_packed_as_its_converter_does(tmp_path):
    layer = load_file(str(RECORDS / "nunchaku_t5" / "layer.safetensors"))
    made, meant = text_packed.tinychat(layer["weight"], layer["scale"], layer["zero"])
    for name, tensor in made.items():
        assert torch.equal(tensor, layer[name]), name
    # the weight it was given is what it means, in BF16
    assert torch.equal(meant.bfloat16(), layer["weight"])
    from support.text_encoders import t5

    model = write_file(t5(d_model=128, d_ff=256, d_kv=32, num_layers=1, vocab_size=64), tmp_path / "t5.safetensors", "nunchaku_t5")
    stored = load_file(str(tmp_path / "t5.safetensors"))
    assert {f"encoder.block.0.layer.1.DenseReluDense.wo.{leaf}" for leaf in made} <= stored.keys()
    assert "shared.weight" in stored and hidden(model).isfinite().all()


def test_large_files_have_holes_and_the_same_content(tmp_path, monkeypatch):
    model = tools.qwen3(64)
    model.model.embed_tokens.weight.data[:62] = 0
    write(model, tmp_path / "a", "ct_w8a8")
    monkeypatch.setattr(text_packed, "LARGE", 0)
    write(model, tmp_path / "b", "ct_w8a8")
    one, other = (load_file(str(tmp_path / at / "model.safetensors")) for at in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

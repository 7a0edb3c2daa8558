"""Formats that this pack only hands to the host (quant/host_formats.py): what is loaded is what stock ComfyUI loads of
the same file, bit for bit; what is saved is the whole layer; and a host that lacks the format is told so by name.

The weights are comfy-kitchen's own quantization where it has the layout.
"""

from __future__ import annotations

import json

import pytest
import torch
from comfy_kitchen import tensor as kitchen
from safetensors.torch import load_file, save_file

from quantized_transformers import host
from quantized_transformers.loaders import model, plan
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.families import comfy as markers
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.queries import Query
from quantized_transformers.loaders.report import describe_report
from quantized_transformers.makers.save import save
from quantized_transformers.quant.host_formats import HOST_FORMATS
from quantized_transformers.views import verdict
from quantized_transformers.views.card import card
from support import flux
from support.common import rel_l2

pytestmark = pytest.mark.parity

LAYERS = ("double_blocks.0.img_mlp.0", "double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1")
# name in reports -> word of the marker, comfy-kitchen's layout, how it quantizes, what the marker says besides
CASES = {
    "ConvRot W4A4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {}, {"convrot_groupsize": 256}),
    "W4A8 (INT8)": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {}, {"group_size": 16, "convrot_groupsize": 256}),
    "W6A8 (INT8)": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {"bits": 6}, {"group_size": 16, "convrot_groupsize": 256}),
    "AWQ W4A16": ("awq_w4a16", "", {}, {"group_size": 64}),
    "INT4": ("int4_tensorwise", "", {}, {"convrot": True, "convrot_groupsize": 256}),
}


def marker(conf: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def by_shape(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A layer of the right dtypes and shapes, for a host that cannot make one."""
    codes = torch.ones(rows, columns * (3 if name.startswith("W6") else 2) // 4, dtype=torch.int8)
    return {"weight": codes} | {
        "ConvRot W4A4": {"weight_scale": torch.ones(rows)}, "INT4": {"weight_scale": torch.ones(rows, 1)},
        "AWQ W4A16": {leaf: torch.ones(columns // 64, rows).bfloat16() for leaf in ("weight_scale", "weight_zeros")},
    }.get(name, {"weight_s_rel": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
                 "weight_s_channel": torch.ones(rows)})


def quantized(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(the tensors of a layer, what comfy-kitchen decodes them to or None where it does not know them)."""
    word, layout, options, conf = CASES[name]
    leaves, decoded = by_shape(name, *weight.shape), None
    if word in host.quantized_formats() and layout:
        made = kitchen.QuantizedTensor.from_float(weight.float(), layout, **options)
        leaves = {leaf.replace("w", "weight", 1): tensor for leaf, tensor in made.state_dict("w").items()}
        decoded = made.dequantize()
    return leaves | {"comfy_quant": marker({"format": word, **conf})}, decoded


@pytest.fixture(scope="module")
def plain(tiny, output):
    """A natively named FLUX.1 without quantized layers."""
    path, _ = save(load(tiny.bf16).patcher, "plain", "exact", step=lambda n: None)
    return load_file(path)


def load(reference, **request):
    return model.load(model.Request(str(reference), **request), quiet=True)


def run(patcher):
    return flux.comfy_velocity(patcher, **flux.inputs())


@pytest.fixture(scope="module", params=CASES)
def case(request, plain, tmp_path_factory):
    """(name in reports, a file with three layers in the format, the same with the decoded weights or None)."""
    root, tensors, decoded = tmp_path_factory.mktemp("handed"), dict(plain), dict(plain)
    for layer in LAYERS:
        leaves, weight = quantized(request.param, tensors.pop(f"{layer}.weight"))
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in leaves.items()}
        decoded[f"{layer}.weight"] = weight
    save_file(tensors, str(root / "quantized.safetensors"))
    if any(weight is None for weight in decoded.values()):
        return request.param, root / "quantized.safetensors", None
    save_file(decoded, str(root / "decoded.safetensors"))
    return request.param, root / "quantized.safetensors", root / "decoded.safetensors"


def test_every_format_has_a_case():
    assert {word for word, *_ in CASES.values()} == HOST_FORMATS.keys()
    assert [name for fmt in HOST_FORMATS.values() for name in fmt.names] == list(CASES)


def test_inspect_names_it(case):
    name, path, _ = case
    description = describe(Checkpoint(locate(str(path))))
    assert not description.problems and description.formats[name] == 3 and description.family == "comfy"
    report = describe_report(description)
    assert f"3 {name}" in report and f"{name} is ComfyUI's own format '{CASES[name][0]}'" in report
    assert card(Query(str(path)))["family"] == f"ComfyUI {name}"


def test_it_is_what_stock_comfyui_loads(case, output):
    import comfy.sd

    name, path, _ = case
    word = CASES[name][0]
    if word not in host.quantized_formats():
        with pytest.raises(CheckpointError, match=f"does not have the format '{word}', which 3 layers are in"):
            load(path)
        assert verdict.of_formats([name]).level == verdict.RED
        return
    loaded = load(path)
    assert f"{name}: multiplied by ComfyUI itself" in loaded.report
    assert torch.equal(run(loaded.patcher), run(comfy.sd.load_diffusion_model(str(path))))
    again, _ = save(loaded.patcher, f"again {word} {name[:4]}", "exact", step=lambda n: None)
    stored, written = load_file(str(path)), load_file(again)
    for layer in LAYERS:
        leaves = {tensor.removeprefix(f"{layer}.") for tensor in stored if tensor.startswith(f"{layer}.")}
        for leaf in leaves - {"comfy_quant"}:
            assert torch.equal(written[f"{layer}.{leaf}"].view(torch.uint8), stored[f"{layer}.{leaf}"].view(torch.uint8)) \
                if stored[f"{layer}.{leaf}"].ndim else written[f"{layer}.{leaf}"] == stored[f"{layer}.{leaf}"], leaf
        conf = json.loads(bytes(written[f"{layer}.comfy_quant"].tolist()))
        assert conf["format"] == word
    assert torch.equal(run(load(again).patcher), run(loaded.patcher))


def test_scales_that_mean_nothing_are_refused(case, tmp_path):
    """Where the host has the format. Rules are of comfy-kitchen's quantization, which divides a largest magnitude."""
    name, path, _ = case
    word = CASES[name][0]
    tried = 0
    for leaf in HOST_FORMATS[word].fields:
        for value, words in ((torch.nan, "NaN"), (torch.inf, "infinite values"), (-1, "negative values")):
            tensors = load_file(str(path))
            changed = tensors.get(f"{LAYERS[0]}.{leaf}")
            small = changed is not None and changed.dtype == torch.float8_e4m3fn
            if changed is None or not changed.is_floating_point() or small and words.startswith("inf") \
                    or words.startswith("neg") and word == "awq_w4a16":
                continue
            changed.view(-1)[-1] = value
            for stored in [changed, changed.view(torch.uint8)] if small else [changed]:
                save_file({**tensors, f"{LAYERS[0]}.{leaf}": stored}, str(tmp_path / "model.safetensors"))
                if word not in host.quantized_formats():
                    part = {one: t for key, t in load_file(str(tmp_path / "model.safetensors")).items()
                            for one in [key.removeprefix(f"{LAYERS[0]}.")] if key != one and one != "bias"}
                    with pytest.raises(ValueError, match=f"{leaf} holds {words}"):
                        markers._as_it_is({"format": word}, plan.Layer(LAYERS[0], name, ("weight",)), part)
                else:
                    with pytest.raises(CheckpointError, match=f"{LAYERS[0]}.{leaf} holds {words}, expected "):
                        load(tmp_path / "model.safetensors")
                tried += 1
    assert tried >= 3


def test_dequantized_is_the_decoded_weight(case):
    name, path, decoded = case
    if decoded is None:
        assert CASES[name][0] not in host.quantized_formats() or not CASES[name][1]
        return
    loaded = load(path, compute="dequantize")
    assert f"{name}: dequantized for every matmul" in loaded.report
    assert rel_l2(run(loaded.patcher), run(load(decoded, dtype="fp32").patcher)) < 1e-5
    assert rel_l2(run(load(path).patcher), run(loaded.patcher)) > 1e-3  # else nothing would tell the two apart


@pytest.mark.parametrize("leaf, wrong, words", [
    ("weight_s_rel", torch.ones(4, 4), "weight_s_rel is [4, 4], expected rows x groups"),
    ("weight_s_channel", None, "weight_s_channel is missing"),
    ("weight_codebook", torch.ones(15), "weight_codebook is [15], expected 16 values"),
    ("weight", torch.ones(8, 8, dtype=torch.int8), "weight is [8, 8], expected rows x 4/8 of the columns"),
    ("weight_s_channel", torch.ones(1024, dtype=torch.float64), "weight_s_channel is F64, expected F32")])
def test_what_does_not_fit_is_refused(leaf, wrong, words, plain, tmp_path):
    layer, tensors = LAYERS[0], dict(plain)
    weight = tensors.pop(f"{layer}.weight")
    leaves = by_shape("W4A8 (INT8)", *weight.shape) | {"comfy_quant": marker({"format": "asym_w4a8_int8"})} | {leaf: wrong}
    tensors |= {f"{layer}.{name}": tensor for name, tensor in leaves.items() if tensor is not None}
    save_file(tensors, str(tmp_path / "wrong.safetensors"))
    problems = describe(Checkpoint(locate(str(tmp_path / "wrong.safetensors")))).problems
    assert len(problems) == 1 and words in problems[0]

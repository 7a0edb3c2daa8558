"""optimum-quanto and torchao: their own exports, layer by layer, and a whole transformer.

tests/data/exports/quanto (0.2.7) and torchao (0.18) hold one Linear each of a tiny FLUX.1 that diffusers saved, made by
shared/tools/export_tiny_wider.py, with every eighth row of the weight as the tool dequantizes it in BF16. quanto/int4
and quanto/int2 hold three Linears in BF16, by quanto's `quantize` and `freeze`: groups of 128 and of 32 columns, and of
rows, and the tool's dequantization with scales and shifts as F32, in which it does not round.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.codecs import codec
from support import common, packed
from support.packed_files import EXPORTS, layers_of, load, of_kinds, rel

pytestmark = pytest.mark.parity

FOLDERS = [f"{tool}/{kind}" for tool, kinds in {"quanto": ("int8", "float8"), "torchao": ("int8wo", "fp8wo")}.items() for kind in kinds]


@pytest.mark.parametrize("folder", FOLDERS)
def test_real_exports_mean_what_the_tool_dequantizes(folder):
    expected = load_file(str(EXPORTS / folder / "expected.safetensors"))
    (name, one, tile), = layers_of(EXPORTS / folder, "rows")
    meant = codec(tile.place.codec).dequantize(tile, torch.float32)[::8]
    assert torch.equal(meant.bfloat16(), expected[f"{name}.weight"].bfloat16()) and one.format.name != "INT8"


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_real_exports_of_few_bits_mean_what_the_tool_dequantizes(kind):
    expected = load_file(str(EXPORTS / "quanto" / kind / "expected.safetensors"))
    found = {name: tile for name, _, tile in layers_of(EXPORTS / "quanto" / kind, "rows")}
    assert {name: tuple(tile["scale"].shape) for name, tile in found.items()} == \
        {"groups": (32, 2), "row": (24, 1), "thirty_two": (9, 5)}
    for name, tile in found.items():
        assert torch.equal(codec(tile.place.codec).dequantize(tile, torch.float32)[::8], expected[f"{name}.weight"]), name


def called(tool, made):
    tensors, meant = made
    names = {"quanto": ("weight._data", "weight._scale"), "torchao": ("_weight_qdata", "_weight_scale")}[tool]
    beside = {"output_scale": torch.ones(()), "input_scale": torch.ones(())} if tool == "quanto" else {}
    return {names[0]: tensors["weight"], names[1]: tensors["scale"], **beside}, meant


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    reference, tensors, _ = of_kinds({f"{tool} {kind}": lambda w, tool=tool, kind=kind: called(tool, packed.sdnq(w, kind))
                                      for tool in ("quanto", "torchao") for kind in ("int8", "float8_e4m3fn")}
                                     | {"quanto int4": packed.quanto, "quanto int2": lambda w: packed.quanto(w, 2, 32)})
    config = {**dict(reference.config), "_class_name": "FluxTransformer2DModel"}
    return common.save(tmp_path_factory.mktemp("rows") / "whole", tensors, config), reference


def test_a_transformer_of_every_kind(folder):
    loaded = load(folder[0])
    assert rel(loaded, folder[1]) < 1e-5 and loaded.description.formats.keys() >= \
        {"INT8 (blocks)", "FP8 (blocks)", "UINT4 (groups)"}


def leaf(tensors, end):
    return next(name for name in tensors if name.endswith(end))


MUTATIONS = {
    "no scale": (lambda t: t.pop(leaf(t, "weight._scale")), "scale is missing"),
    "4 bits": (lambda t: t.update({leaf(t, "_weight_qdata"): torch.zeros(256, 128, dtype=torch.uint8)}), "U8"),
    "outputs quantized": (lambda t: t[leaf(t, ".output_scale")].fill_(2), "outputs are quantized"),
    "zero points": (lambda t: t.update({leaf(t, "_weight_qdata").replace("qdata", "zero_point"): torch.ones(256, 1, dtype=torch.int8)}),
                    "zero points other than 0|weight_zero_point is"),
    "a scale that is no number": (lambda t: t[leaf(t, "_weight_scale")].fill_(float("nan")), "weight_scale holds NaN"),
    "a group too few": (lambda t: t.update({(n := leaf(t, "weight._data._data")): t[n][1:].clone()}), "neither 2 nor 4 bits"),
    "no bias": (lambda t: t.pop(leaf(t, "weight._shift").replace("weight._shift", "bias")), "without a bias"),
    "a shift that is no number": (lambda t: t[leaf(t, "weight._shift")].fill_(float("inf")), r"weight\._shift holds infinite values"),
    "no shift": (lambda t: t.pop(leaf(t, "weight._shift")), "U8"),
    "a scale too few": (lambda t: t.update({leaf(t, "weight._scale"): torch.ones(3, 1)}), "weight_scale is"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_refused(folder, tmp_path, name):
    change, message = MUTATIONS[name]
    tensors = common.stored(folder[0])
    change(tensors)
    with pytest.raises(CheckpointError) as refused:
        model.load(model.Request(str(common.save(tmp_path / "changed", tensors, common.config_of(folder[0])))), quiet=True)
    assert re.search(message, str(refused.value)), refused.value

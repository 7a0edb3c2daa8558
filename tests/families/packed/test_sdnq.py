"""SDNQ: its own exports, layer by layer, and whole transformers by its formulas.

tests/data/exports/sdnq holds one Linear each of a tiny FLUX.1, made by shared/tools/export_tiny_wider.py `sdnq` (sdnq
0.2.8; `--double` is SVD), with every eighth row of the weight as sdnq's own dequantizer makes it. `bits` holds a Linear
[32, 64] of each type, called so, by one call of `sdnq_post_load_quant` with weights_dtype uint4, group_size 32 and a list
of names of every kind a type in modules_dtype_dict, and one that "minimum_6bit" lists.
"""

from __future__ import annotations

import json
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

FORMATS = {"uint4": "UINT4 (groups)", "uint4_svd": "UINT4 (groups)", "int4": "UINT4 (groups)", "uint8": "UINT8 (groups)",
           "int8": "INT8 (blocks)", "float8_e4m3fn": "FP8 (blocks)"}


@pytest.mark.parametrize("kind", FORMATS)
def test_real_exports_mean_what_the_tool_dequantizes(kind):
    """Equal but for one fused multiply-add; the tool adds its low-rank pair in BF16, of 8 bits."""
    expected = load_file(str(EXPORTS / "sdnq" / kind / "expected.safetensors"))
    (name, one, tile), = layers_of(EXPORTS / "sdnq" / kind, "sdnq")
    meant, wanted = codec(tile.place.codec).dequantize(tile, torch.float32)[::8], expected[f"{name}.weight"].float()
    assert one.format.name == FORMATS[kind] and ("up" in tile.fields) is kind.endswith("svd")
    worst = float((meant - wanted).abs().max() / wanted.abs().max())
    assert worst <= (2 ** -7 if kind.endswith("svd") else 2 ** -22)


def test_types_of_layers_are_told_by_the_lists_as_the_tool_reads_them():
    """Ten packed types side by side, whose bytes alone do not tell 2 bits from 4, or 3 from 6."""
    expected = load_file(str(EXPORTS / "sdnq" / "bits" / "expected.safetensors"))
    found = {name: (one.format.kind, codec(tile.place.codec).dequantize(tile, torch.float32)[::8])
             for name, one, tile in layers_of(EXPORTS / "sdnq" / "bits", "sdnq")}
    assert {name.rpartition(".")[2]: kind for name, (kind, _) in found.items()} == {
        "at_least": "int6", **{f"{sign}int{bits}": f"{sign}int{bits}" for bits in (2, 3, 5, 6, 7, 8) for sign in ("", "u")},
        "uint4": "uint4"}
    for name, (_, meant) in found.items():
        wanted = expected[f"{name}.weight"].float()
        assert float((meant - wanted).abs().max() / wanted.abs().max()) <= 2 ** -22, name


KINDS = {"uint4": lambda w: packed.sdnq(w, "uint4", 32), "uint4 a row": lambda w: packed.sdnq(w, "uint4"),
         "uint4 svd": lambda w: packed.sdnq(w, "uint4", 64, 16), "int4": lambda w: packed.sdnq(w, "int4", 64),
         "uint8": lambda w: packed.sdnq(w, "uint8"), "uint8 groups": lambda w: packed.sdnq(w, "uint8", 64),
         "int8": lambda w: packed.sdnq(w, "int8"), "int8 svd": lambda w: packed.sdnq(w, "int8", rank=8),
         "fp8": lambda w: packed.sdnq(w, "float8_e4m3fn"), "int6": lambda w: packed.sdnq(w, "int6", 32),
         "uint5": lambda w: packed.sdnq(w, "uint5", 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    reference, tensors, kinds = of_kinds(KINDS)
    lists: dict[str, list[str]] = {}
    for kind, names in kinds.items():
        lists.setdefault({"fp8": "float8_e4m3fn"}.get(kind, kind.split()[0]), []).extend(f"{name}.weight" for name in names)
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {
        "quant_method": "sdnq", "weights_dtype": "uint4", "use_svd": True, "modules_dtype_dict": lists}}
    return common.save(tmp_path_factory.mktemp("sdnq") / "whole", tensors, {**dict(reference.config), **config}), reference


def test_a_transformer_of_every_kind(folder):
    loaded = load(folder[0])
    assert rel(loaded, folder[1]) < 1e-5
    assert loaded.description.formats.keys() >= set(FORMATS.values()) and loaded.description.family == "sdnq"
    assert "INT8" not in loaded.description.formats  # the host's would quantize activations


def leaf(tensors, end):
    return next(name for name in tensors if name.endswith(end))


MUTATIONS = {
    "hadamard": (lambda t, c: c.update(use_hadamard=True), "use_hadamard"),
    "a codebook": (lambda t, c: c.update(use_codebook=True), "use_codebook"),
    "another type": (lambda t, c: c.update(weights_dtype="float4_e2m1fn"), "float4_e2m1fn, which this version does not load"),
    "another type of a layer": (lambda t, c: c.update(modules_dtype_dict={"uint1": ["x"]}), "uint1, which"),
    "more bits than there are types of": (lambda t, c: c.update(modules_dtype_dict={"minimum_9bit": ["x"]}), "int9, which"),
    "lists of no names": (lambda t, c: c.update(modules_dtype_dict={"int5": 5}), "no object of types"),
    "3 bits for 6": (lambda t, c: c["modules_dtype_dict"].update(int3=c["modules_dtype_dict"].pop("int6")), "weight is|expected|tensors have"),
    "no zero points of 5 bits": (lambda t, c: t.pop(next(n.replace("weight", "zero_point") for n, x in t.items() if x.shape[1:] == (5,))),
                                 "is not uint5, which is declared"),
    "half a pair": (lambda t, c: t.pop(leaf(t, ".svd_up")), "belong together"),
    "no zero points of 8 bits": (lambda t, c: t.pop(next(n.replace("weight", "zero_point") for n, x in t.items()
                                                         if x.dtype == torch.uint8 and x.ndim == 3)), "is not uint8, which is declared"),
    "codes too few": (lambda t, c: t.update({(n := next(n for n, x in t.items() if x.dtype == torch.uint8 and x.ndim == 1)): t[n][:-8].clone()}),
                      "weight is|expected|tensors have"),
    "a scale that is no number": (lambda t, c: t[leaf(t, ".scale")].fill_(float("nan")), "scale holds NaN"),
    "an unknown companion": (lambda t, c: t.update({leaf(t, ".scale") + "_2": torch.ones(1)}), "unexpected tensors"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_refused(folder, tmp_path, name):
    change, message = MUTATIONS[name]
    tensors, config = common.stored(folder[0]), json.loads((folder[0] / "config.json").read_text(encoding="utf-8"))
    change(tensors, config["quantization_config"])
    with pytest.raises(CheckpointError) as refused:
        model.load(model.Request(str(common.save(tmp_path / "changed", tensors, config))), quiet=True)
    assert re.search(message, str(refused.value)), refused.value

"""compressed-tensors: llm-compressor's own exports, layer by layer, and whole transformers by its formulas.

tests/data/exports/compressed-tensors holds one Linear each of a tiny Qwen3, made by shared/tools/export_tiny_wider.py
`compressed` (llmcompressor 0.14.0.1, compressed-tensors 0.19.0: W4A16, W4A16_ASYM, ..., and GPTQ with actorder "group"),
with every eighth row of the weight as transformers decompresses it (run_compressed=False, BF16).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.quant.codecs import codec
from support import common, packed
from support.packed_files import EXPORTS, layers_of, load, of_kinds, rel

pytestmark = pytest.mark.parity

TOOL = EXPORTS / "compressed-tensors"
# Export -> (format in reports, whether activations are to stay as they are)
SCHEMES = {"w4a16": ("UINT4 (groups)", False), "w4a16_gidx": ("UINT4 (groups)", False), "w4a16_asym": ("UINT4 (groups)", False),
           "w8a16": ("UINT8 (groups)", False), "w8a8": ("INT8", False), "w4a8": ("UINT4 (groups)", False), "fp8": ("FP8", False),
           "fp8_dynamic": ("FP8 (blocks)", False), "fp8_block": ("FP8 (blocks)", False), "nvfp4": ("NVFP4", False),
           "nvfp4a16": ("NVFP4", True), "mxfp4": ("MXFP4", False), "mxfp8": ("MXFP8", False)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_real_exports_mean_what_the_tool_decompresses(scheme):
    expected = load_file(str(TOOL / scheme / "expected.safetensors"))
    found = list(layers_of(TOOL / scheme, "compressed-tensors"))
    assert [f"{name}.weight" for name, *_ in found] == list(expected)
    (name, one, tile), = found
    meant = codec(tile.place.codec).dequantize(tile, torch.float32).to(torch.bfloat16)[::8]
    assert torch.equal(meant, expected[f"{name}.weight"].to(torch.bfloat16))
    assert (one.format.name, one.full_precision) == SCHEMES[scheme]


def weights(bits, strategy, size=None, **others):
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size, "symmetric": True, **others}


def floats(bits, strategy, **others):
    return weights(bits, strategy, **others) | {"type": "float"}


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
# Kind -> (its formula, its group of config_groups)
KINDS = {
    "W4A16": (packed.ct_packed, {"weights": weights(4, "group", 128)}),
    "W4A16 act order": (lambda w: packed.ct_packed(w, size=32, order=True), {"weights": weights(4, "group", 32, actorder="group")}),
    "W4A16 asymmetric": (lambda w: packed.ct_packed(w, zeros=True, size=32), {"weights": weights(4, "group", 32, symmetric=False)}),
    "W3A16": (lambda w: packed.ct_packed(w, 3, 64), {"weights": weights(3, "group", 64)}),
    "W8A16": (lambda w: packed.ct_packed(w, 8, 0), {"weights": weights(8, "channel")}),
    "W8A8": (packed.ct_int, {"weights": weights(8, "channel"), "input_activations": TOKEN}),
    "W8, int-quantized": (packed.ct_int, {"weights": weights(8, "channel")}),
    "W4A8": (lambda w: packed.ct_int(w, 4, 128), {"weights": weights(4, "group", 128), "input_activations": TOKEN}),
    "FP8": (lambda w: packed.ct_fp8(w, 0), {"weights": floats(8, "tensor"), "input_activations": TOKEN}),
    "FP8_DYNAMIC": (lambda w: packed.ct_fp8(w, 1), {"weights": floats(8, "channel"), "input_activations": TOKEN}),
    "FP8_BLOCK": (lambda w: packed.ct_fp8(w, 128, 128), {"weights": floats(8, "block", block_structure=[128, 128])}),
    "NVFP4": (packed.ct_nvfp4, {"weights": floats(4, "tensor_group", group_size=16), "input_activations": TOKEN}),
    "MXFP4": (lambda w: packed.ct_mx(w, 4), {"weights": floats(4, "group", group_size=32)}),
    "MXFP8": (lambda w: packed.ct_mx(w, 8), {"weights": floats(8, "group", group_size=32)})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(a tiny FLUX.1 with every kind in it, the same in floats)"""
    reference, tensors, kinds = of_kinds({kind: pack for kind, (pack, _) in KINDS.items()})
    groups = {f"group_{i}": {**KINDS[kind][1], "targets": names} for i, (kind, names) in enumerate(kinds.items())}
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["proj_out"]}}
    return common.save(tmp_path_factory.mktemp("ct") / "whole", tensors, {**dict(reference.config), **config}), reference


def test_a_transformer_of_every_kind(folder):
    loaded = load(folder[0], compute="dequantize")
    assert rel(loaded, folder[1]) < 1e-5
    description = loaded.description
    assert description.family == "compressed-tensors" and not description.problems
    assert description.formats.keys() >= {fmt for fmt, _ in SCHEMES.values()}


def test_weights_alone_are_not_multiplied_by_quantized_activations(folder):
    """ComfyUI's int8_tensorwise quantizes activations whatever it is asked for: what declares none does not go there."""
    loaded = load(folder[0])
    kinds = {name: group for group in common.config_of(folder[0])["quantization_config"]["config_groups"].values()
             for name in group["targets"]}
    groups = loaded.description.layers
    alone = {fmt for name, fmt in groups.items() if "input_activations" not in kinds.get(name, {}) and name in kinds}
    assert "INT8" not in alone and {"UINT4 (groups)", "UINT8 (groups)"} <= alone
    assert set(loaded.description.full_precision) == {name for name in kinds if "input_activations" not in kinds[name]
                                                      and not groups[name].startswith("UINT")}




def leaf(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def cut(end):
    return lambda t, c: t.update({leaf(t, end): t[leaf(t, end)][:-1].clone()})


def gone(end):
    return lambda t, c: t.pop(leaf(t, end))


def set_in(end, value):
    def change(tensors, config):
        tensors[leaf(tensors, end)].view(-1)[0] = value
    return change


MUTATIONS = {
    "no config_groups": (lambda t, c: c.pop("config_groups"), "no config_groups"),
    "a sparse format": (lambda t, c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    "a transform": (lambda t, c: c.update(transform_config={"config_groups": {"R1": {}}}), "transform"),
    "bits beyond a byte": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=16), "16 bits"),
    "a group without weights": (lambda t, c: c["config_groups"]["group_0"].update(weights=None), "nothing of weights"),
    "a pattern that is none": (lambda t, c: c["ignore"].append("re:("), "pattern"),
    "a layer of no group": (lambda t, c: c["config_groups"]["group_0"]["targets"].pop(0), "no group of config_groups covers"),
    "other bits than the words": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "weight is .*expected"),
    "another group size": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(group_size=64), "weight_scale is .*expected"),
    "another block size": (lambda t, c: next(g for g in c["config_groups"].values() if g["weights"]["strategy"] == "block")["weights"]
                           .update(block_structure=[64, 64]), r"blocks of \[64, 64\]"),
    "blocks of no power of two": (lambda t, c: next(g for g in c["config_groups"].values() if g["weights"]["strategy"] == "block")[
        "weights"].update(block_structure=[96, 96]), "powers of two"),
    "no zero points": (gone(".weight_zero_point"), "weight_zero_point is missing"),
    "no order": (gone(".weight_g_idx"), "weight_g_idx is missing"),
    "a short order": (cut(".weight_g_idx"), "weight_g_idx is"),
    "an order out of range": (set_in(".weight_g_idx", 99), "99"),
    "no shape": (gone(".weight_shape"), "weight_shape is missing"),
    "a shape of nothing": (set_in(".weight_shape", 0), "weight_shape is missing"),
    "another shape": (lambda t, c: t.update({leaf(t, ".weight_shape"): torch.tensor([8, 8])}), "weight_shape"),
    "a scale too few": (cut(".weight_scale"), "weight_scale is|the scale is"),
    "a scale that is no number": (set_in(".weight_scale", float("nan")), "finite"),
    "no divisor": (gone(".weight_global_scale"), "without weight_global_scale|are not known"),
    "a divisor of zero": (set_in(".weight_global_scale", 0), "finite positive"),
    "not compressed": (lambda t, c: t.update({leaf(t, ".weight_packed").replace("_packed", ""): t.pop(leaf(t, ".weight_packed")).float()}),
                       "not compressed"),
    "both weights": (lambda t, c: t.update({leaf(t, ".weight_packed").replace("_packed", ""): torch.ones(2)}), "weights of one layer"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_refused(folder, tmp_path, name):
    change, message = MUTATIONS[name]
    tensors, config = common.stored(folder[0]), json.loads((Path(folder[0]) / "config.json").read_text(encoding="utf-8"))
    change(tensors, config["quantization_config"])
    with pytest.raises(CheckpointError) as refused:
        model.load(model.Request(str(common.save(tmp_path / "changed", tensors, config))), quiet=True)
    assert re.search(message, str(refused.value)), refused.value

"""GPTQ, AWQ and AutoRound: the tools' own exports, layer by layer, and whole transformers by their formulas.

tests/data/exports/gptqmodel (7.7.0) and auto-round (0.16.1) hold one Linear each of a tiny Qwen3, made by
shared/tools/export_tiny_wider.py (`gptq` with --sym, --desc-act --group 64, --bits 8 --format gptq_v2, --bits 3 and 2;
`autoround` with --format auto_round and auto_awq), with every eighth row of the weight: by gptqmodel's dequantize_weight,
by AutoRound's own QuantLinear, and for AWQ by autoawq 0.2.9's dequantize_gemm.
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
from quantized_transformers.quant.layouts.tiled import is_tiled, tiles_of
from support import common, flux, packed
from support.packed_files import EXPORTS, layers_of, load, of_kinds, rel

pytestmark = pytest.mark.parity

FOLDERS = sorted(path.parent for tool in ("gptqmodel", "auto-round") for path in (EXPORTS / tool).glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name} {path.name}")
def test_real_exports_mean_what_the_tool_dequantizes(folder):
    """Equal in the dtype that the tool computes in; gptqmodel rounds scales to its BF16 first."""
    expected = load_file(str(folder / "expected.safetensors"))
    (name, _, tile), = layers_of(folder, "gptq")
    wanted = expected[f"{name}.weight"]
    if wanted.dtype == torch.bfloat16:
        tile = tile.having(scale=tile["scale"].bfloat16().float())
    assert torch.equal(codec(tile.place.codec).dequantize(tile, wanted.dtype)[::8], wanted)


# Kind -> its formula; one file is one version and one of GPTQ and AWQ
FILES = {
    "gptq": {"sym": lambda w: packed.gptq(w), "asymmetric": lambda w: packed.gptq(w, zeros=True, size=32),
             "act order": lambda w: packed.gptq(w, zeros=True, order=True, size=64), "8 bits": lambda w: packed.gptq(w, 8, 0),
             "3 bits": lambda w: packed.gptq(w, 3, zeros=True), "2 bits": lambda w: packed.gptq(w, 2, 32, zeros=True),
             "no index": lambda w: packed.gptq(w, index=False, negative=True)},
    "gptq_v2": {"sym": lambda w: packed.gptq(w, version=2), "3 bits": lambda w: packed.gptq(w, 3, version=2, zeros=True),
                "8 bits": lambda w: packed.gptq(w, 8, 32, 2, zeros=True)},
    "gemm": {"awq": packed.awq, "groups of 32": lambda w: packed.awq(w, 32)}}
METHOD = {"gemm": "awq"}


def whole(folder, layout, declared=None):
    reference, tensors, _ = of_kinds(FILES[layout])
    config = {"quant_method": METHOD.get(layout, "gptq"), "bits": 4, "checkpoint_format": layout}
    said = {} if declared is None else {"quantization_config": declared or config}
    return common.save(folder, tensors, {**dict(reference.config), "_class_name": "FluxTransformer2DModel", **said}), reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("gptq") / "v1", "gptq", {})


@pytest.mark.parametrize("layout", ["gptq", "gemm"])
def test_saved_and_loaded_again(layout, tmp_path, folder):
    """In one file, where words come behind bytes of any number."""
    import comfy.sd

    made, _ = folder if layout == "gptq" else whole(tmp_path / "whole", layout, {})
    loaded = load(made)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), loaded.patcher)
    again = load(tmp_path / "saved.safetensors")
    assert torch.equal(*(flux.comfy_velocity(one.patcher, **flux.inputs()) for one in (loaded, again)))
    codecs = {tile.place.codec for module in again.patcher.model.diffusion_model.modules()
              if is_tiled(getattr(module, "weight", None)) for tile in tiles_of(module.weight)}
    assert codecs >= ({"u4_gptq", "u8_gptq", "u4_groups"} if layout == "gptq" else {"u4_awq"})


@pytest.mark.parametrize("layout", FILES)
def test_a_transformer_of_every_kind(layout, tmp_path, folder):
    made, reference = folder if layout == "gptq" else whole(tmp_path / "whole", layout, {})
    loaded = load(made)
    assert rel(loaded, reference) < 1e-5
    assert loaded.description.formats["UINT4 (groups)"] > 10 and loaded.description.family == "gptq"


@pytest.mark.parametrize(("method", "packing", "layout"), [("auto-round", "auto_round:auto_gptq", "gptq"), ("auto-round", "auto_round:auto_awq", "gemm")])
def test_auto_round_writes_both(method, packing, layout, tmp_path):
    made, reference = whole(tmp_path / "whole", layout, {"quant_method": method, "packing_format": packing})
    assert rel(load(made), reference) < 1e-5


OLD = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": False,
       "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}  # auto-gptq's, to 0.4


@pytest.mark.parametrize("form", ["folder", "file", "pipeline"])
def test_an_old_folder_says_it_in_quantize_config(folder, tmp_path, form):
    """Asymmetric zero points, of which nothing else says the version."""
    config = {key: value for key, value in common.config_of(folder[0]).items() if key != "quantization_config"}
    made = common.save(tmp_path / "transformer", common.stored(folder[0]), config)
    (made / "quantize_config.json").write_text(json.dumps(OLD), encoding="utf-8")
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    file, = made.glob("*.safetensors")
    loaded = load({"folder": made, "file": file, "pipeline": tmp_path}[form])
    assert rel(loaded, folder[1]) < 1e-5 and loaded.description.declared_in == ["quantize_config.json"]


@pytest.mark.parametrize(("said", "message"), [({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq' in one place and 'gptq_v2'"),
                                               ({"bits": 8}, "bits is '4'"), ({"quant_method": "awq"}, "quant_method is 'gptq'")])
def test_quantize_config_that_contradicts_config_is_refused(folder, tmp_path, said, message):
    made = common.save(tmp_path / "changed", common.stored(folder[0]), common.config_of(folder[0]))
    (made / "quantize_config.json").write_text(json.dumps(OLD | said), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(made)


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_files_tell_their_version_without_a_word(version, tmp_path):
    reference, tensors, _ = of_kinds({"one": lambda w: packed.gptq(w, version=version), "wide": lambda w: packed.gptq(w, 8, version=version)})
    made = common.save(tmp_path / "whole", tensors, {**dict(reference.config), "_class_name": "FluxTransformer2DModel"})
    assert rel(load(made), reference) < 1e-5


def test_zeros_wrap_in_the_word_as_gptqmodel_lets_them():
    """Zero points that hold a 0: the subtraction borrowed from the next, and adding to each code would not give it back."""
    from quantized_transformers.quant.packed.gptq import GPTQ

    zeros = torch.tensor([[3, 0, 8, 5, 0, 0, 15, 7]])
    stored = packed.signed((packed.words(zeros, 4, 1).long() - 0x11111111) % 2 ** 32)
    assert GPTQ(4, 1, 0)._zeros("p", stored).tolist() == zeros.tolist()


def leaf(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def cut(end):
    return lambda t, c: t.update({leaf(t, end): t[leaf(t, end)][:-1].clone()})


MUTATIONS = {
    "no zero points": (lambda t, c: t.pop(leaf(t, ".qzeros")), "qzeros missing"),
    "no scales": (lambda t, c: t.pop(leaf(t, ".scales")), "scales missing"),
    "a group out of range": (lambda t, c: t[leaf(t, "attn.to_q.g_idx")].fill_(99), "columns of groups 99 to 99"),
    "a negative group": (lambda t, c: t[leaf(t, "attn.to_q.g_idx")].fill_(-1), "columns of groups -1"),
    "a short order": (cut(".g_idx"), "g_idx is"),
    "a row of words too few": (cut(".qweight"), "weight is|the tensors have|expected"),
    "a group of zero points too few": (cut(".qzeros"), "qzeros is"),
    "a scale that is no number": (lambda t, c: t[leaf(t, ".scales")].fill_(float("inf")), "scales holds infinite values, expected finite numbers"),
    "no version, asymmetric": (lambda t, c: c.pop("quantization_config"), "version 1 or 2"),
    "another layout declared": (lambda t, c: c["quantization_config"].update(quant_method="awq", checkpoint_format="gemm"), "gemm is declared"),
    "a layout that is not known": (lambda t, c: c["quantization_config"].update(checkpoint_format="gptq_p"), "'gptq_p', which this version"),
    "a method of another": (lambda t, c: c["quantization_config"].update(quant_method="vptq"), "vptq"),
    "AWQ's other layout": (lambda t, c: c.update(quantization_config={"quant_method": "awq", "version": "gemv"}), "'gemv'"),
    "zero points of five bits": (lambda t, c: t.update({leaf(t, ".qzeros"): torch.zeros(2, 40, dtype=torch.int32)}), "2, 3, 4 or 8 bits"),
    "floats for codes": (lambda t, c: t.update({leaf(t, ".qweight"): t[leaf(t, ".qweight")].float()}), "weight is F32"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_refused(folder, tmp_path, name):
    change, message = MUTATIONS[name]
    tensors, config = common.stored(folder[0]), json.loads((folder[0] / "config.json").read_text(encoding="utf-8"))
    change(tensors, config)
    with pytest.raises(CheckpointError) as refused:
        model.load(model.Request(str(common.save(tmp_path / "changed", tensors, config))), quiet=True)
    assert re.search(message, str(refused.value)), refused.value

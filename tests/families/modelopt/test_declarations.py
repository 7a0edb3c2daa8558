"""What declarations mean: SGLang-Diffusion's cases for our formats (in brackets: lines of 0.5.23's
test_transformer_quant.py)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.families.declarations import read_declaration
from quantized_transformers.loaders.families.nvfp4_order import from_headers
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.patterns import Globs

pytestmark = pytest.mark.unit


def declare(folder, config=None, metadata=None):
    """The declaration of a folder with this quantization block in config.json and these headers (one file each)."""
    folder.mkdir(exist_ok=True)
    headers = metadata if isinstance(metadata, list) else [metadata or {}]
    names = [f"model-{i}.safetensors" for i in range(len(headers))]
    for i, (name, header) in enumerate(zip(names, headers, strict=True)):
        save_file({f"t{i}": torch.zeros(1)}, str(folder / name), {k: v if isinstance(v, str) else json.dumps(v)
                                                                    for k, v in header.items()} or None)
    if len(names) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return read_declaration(Checkpoint(locate(str(folder))))


# quant_method, quant_algo -> family, or what the refusal says [1952, 2029]
ADMISSION = [
    ("modelopt", "FP8", "modelopt-fp8"), ("modelopt", "NVFP4", "modelopt-nvfp4"), ("modelopt_fp8", None, "modelopt-fp8"),
    ("modelopt_fp4", None, "modelopt-nvfp4"), ("modelopt_fp8", "FP8", "modelopt-fp8"), ("modelopt_fp4", "NVFP4", "modelopt-nvfp4"),
    ("modelopt", "nvfp4", "modelopt-nvfp4"), ("fp8", None, "fp8"), (None, "NVFP4", "modelopt-nvfp4"),
    ("modelopt_fp8", "MXFP8", "!conflicting declarations"), ("modelopt_fp4", "FP8", "!conflicting declarations"),
    ("modelopt", "MIXED_PRECISION", "!ModelOpt MIXED_PRECISION is not supported"),
    ("modelopt", "MXFP8", "modelopt-mxfp8"), ("modelopt", "W8A16", "modelopt-int8"), ("modelopt", "NVFP4_AWQ", "modelopt-nvfp4"), ("modelopt", "NVFP4_SVD", "modelopt-nvfp4"),
    ("modelopt", "W4A16_NVFP4", "modelopt-nvfp4"), ("modelopt", "W4A8_AWQ", "!ModelOpt W4A8_AWQ is not supported"), ("modelopt", None, "!ModelOpt without a quant_algo"),
    ("modelopt", "SOMETHING", "!ModelOpt SOMETHING is not supported"), ("compressed-tensors", None, "!'compressed-tensors'"),
    ("bitsandbytes", None, "!'bitsandbytes'"), ("auto-round", None, "!'auto-round'"), ("modelslim", None, "!'modelslim'"),
    ("mxfp8", None, "!'mxfp8'"), ("convrot_int8", None, "!'convrot_int8'"),
]


@pytest.mark.parametrize(("method", "algo", "expected"), ADMISSION)
@pytest.mark.parametrize("where", ["config", "nested", "quantization_config", "_quantization_metadata"])
def test_admission(method, algo, expected, where, tmp_path):
    spec = {k: v for k, v in (("quant_method", method), ("quant_algo", algo)) if v}
    if where == "nested" and algo:
        spec = {**({"quant_method": method} if method else {}), "quantization": {"quant_algo": algo}}
    arguments = ({"quantization_config": spec},) if where in ("config", "nested") else (None, {where: spec})
    if expected.startswith("!"):
        with pytest.raises(CheckpointError, match=expected[1:]) as caught:
            declare(tmp_path / "x", *arguments)
        assert "what to do:" in str(caught.value)
    else:
        assert declare(tmp_path / "x", *arguments).family == expected


@pytest.mark.parametrize("place", ["quantization_config", "text_config", "compression_config"])
def test_where_config_json_keeps_it(place, tmp_path):
    """[1628, 1646, 1663]"""
    spec = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    found = declare(tmp_path / "x", {place: {"quantization_config": spec} if place == "text_config" else spec})
    assert (found.family, found.activation_scheme) == ("fp8", "dynamic")


def test_a_block_that_is_no_object(tmp_path):
    with pytest.raises(CheckpointError, match="quantization_config is .*expected an object"):
        declare(tmp_path / "x", {"quantization_config": "fp8"})


@pytest.mark.parametrize("key", ["ignore", "ignored_layers", "modules_to_not_convert"])
def test_names_of_the_ignore_list(key, tmp_path):
    found = declare(tmp_path / "x", {"quantization_config": {"quant_method": "fp8", key: ["proj_out"]}})
    assert found.ignore == ("proj_out",)
    with pytest.raises(CheckpointError, match="expected a list"):
        declare(tmp_path / "x", {"quantization_config": {"quant_method": "fp8", key: "proj_out"}})


def test_nested_exclude_modules(tmp_path):
    spec = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["a*"]}}
    assert declare(tmp_path / "x", {"quantization_config": spec}).ignore == ("a*",)


def test_ignore_patterns_match_whole_names():
    """[2054] `*` crosses dots, and everything is a full match: a list for double blocks misses single blocks."""
    names = ["proj_out", "single_transformer_blocks.0.proj_out", "transformer_blocks.0.ff.net.2", "blocks.0", "blocks.01.x",
             "blocks.1.x", "blocks.11.x"]
    assert Globs(("proj_out",)).among(names) == ["proj_out"]
    assert Globs(("transformer_blocks.*",)).among(names) == ["transformer_blocks.0.ff.net.2"]
    assert Globs(("blocks.0*", "blocks.1.*")).among(names) == ["blocks.0", "blocks.01.x", "blocks.1.x"]
    assert Globs(()).among(names) == []


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("value", [True, False, None])
def test_swap_weight_nibbles(nested, value, tmp_path):
    """[1602, 1614] flat and nested; said explicitly it beats packed q/k/v and markers, silent it follows them."""
    spec = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    if value is not None:
        spec |= {"quantization": {"swap_weight_nibbles": value}} if nested else {"swap_weight_nibbles": value}
    found = declare(tmp_path / "x", {"quantization_config": spec})
    assert found.swap_weight_nibbles is value
    for names, packed in ((["blocks.0.attn1.to_q.weight"], False), (["double_blocks.0.img_attn.qkv.weight"], True),
                          (["model.diffusion_model.single_blocks.3.linear1.weight"], True), (["a.comfy_quant"], True)):
        order = from_headers(dict.fromkeys(names), found)
        assert order.low_first is (not packed if value is None else not value)
        assert order.swizzled is packed and order.why


def test_swap_weight_nibbles_must_be_a_switch(tmp_path):
    with pytest.raises(CheckpointError, match="expected true or false"):
        declare(tmp_path / "x", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4",
                                                         "swap_weight_nibbles": "yes"}})


def test_every_shard_repeats_it_and_none_may_contradict(tmp_path):
    spec = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a", "b"]}
    both = {"quantization_config": spec, "_quantization_metadata": spec}
    found = declare(tmp_path / "x", {"quantization_config": spec}, [both, both])
    assert found.family == "modelopt-fp8"
    assert found.origins == ("config.json", "metadata _quantization_metadata", "metadata quantization_config")
    other = {"quantization_config": {**spec, "ignore": ["a"]}}
    with pytest.raises(CheckpointError, match="conflicting quantization declarations: ignore"):
        declare(tmp_path / "y", None, [both, other])


def test_nothing_declared(tmp_path):
    found = declare(tmp_path / "x", {"_class_name": "FluxTransformer2DModel"})
    assert not found.family and not found.origins


def test_comfys_layer_list(tmp_path):
    layers = {"a": {"format": "float8_e4m3fn"}, "b": {"format": "nvfp4"}}
    found = declare(tmp_path / "x", None, {"_quantization_metadata": {"format_version": "1.0", "layers": layers}})
    assert found.family == "nvfp4" and found.comfy and found.layers == layers
    beside = {"_quantization_metadata": {"layers": layers}, "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    found = declare(tmp_path / "y", None, beside)
    assert found.family == "modelopt-fp8" and not found.comfy

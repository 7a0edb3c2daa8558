"""build-fp8 and build-nvfp4 on real nvidia-modelopt exports: numbers, bytes, parity, and SGLang-Diffusion's rules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.nvfp4 import build_nvfp4
from support import bench, bench_build, qwen_image
from support.builders import MODELS, Case, Rules, export_fp8
from support.common import config_of, dequantize, rel_l2, stored
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.parity

STATISTICS = ("quantized_weights", "bf16_fallback_weights", "preserved_ignored_weights", "added_scale_tensors")
# docs/sources/sglang.md, "FP8 builder's statistics". Wan there is 26/0/11/52, the Conv3d patch_embedding among the 26
# (the trap that it names); only weights of two dimensions are quantized here, so it is one of the preserved.
TABLE = {"flux1": (33, 14, 15, 66), "flux2": (28, 10, 13, 56), "wan": (26 - 1, 0, 11 + 1, 52 - 2),
         "hunyuan of the table": (32, 29, 14, 64), "qwen": (22, 12, 9, 44)}
# The width that ComfyUI runs has a second refiner block, all nine weights of it in the preset.
WIDE = TABLE | {"hunyuan": (32, 29 + 9, 14, 64)}
E4M3_ERROR = 0.027  # relative L2 of rounding to 3 bits of mantissa


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = export_fp8(name, tmp_path_factory.mktemp(name.replace(" ", "_")))
        return made[name]

    return get


@pytest.fixture(scope="session")
def built(exports, tmp_path_factory: pytest.TempPathFactory):
    """Name -> the folder that build_fp8 makes of a real export and its backbone, and what it said."""
    made: dict = {}

    def get(name: str):
        if name not in made:
            case = exports(name)
            made[name] = build_fp8(modelopt_hf_dir=str(case.export.parent), base_transformer_dir=str(case.base),
                                   modelopt_backbone_ckpt=str(case.backbone.parent),
                                   output_dir=str(tmp_path_factory.mktemp("built") / "transformer"))
        return made[name]

    return get


def numbers(statistics: dict) -> tuple[int, ...]:
    return tuple(statistics[key] for key in STATISTICS)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def counted(folder: Path, base: Path) -> tuple[int, int]:
    """(FP8 weights, scales) by safetensors itself."""
    tensors = stored(folder)
    assert {n for n in tensors if n.endswith(".weight")} == {n for n in stored(base) if n.endswith(".weight")}
    return (sum(t.dtype == torch.float8_e4m3fn for t in tensors.values()),
            sum(name.endswith(("weight_scale", "input_scale")) for name in tensors))


@pytest.mark.parametrize("name", list(WIDE))
def test_statistics_are_the_reference_table_and_what_was_written(name, exports, built):
    found = built(name)
    assert numbers(found.statistics) == WIDE[name] and found.statistics["output_shards"] == 1
    assert counted(found.folder, exports(name).base) == (WIDE[name][0], WIDE[name][3])


@pytest.mark.parametrize("name", list(TABLE))
def test_sglang_would_load_it(name, exports, built):
    folder = built(name).folder
    rules = Rules(folder)
    assert (rules.method, rules.kind, rules.refused) == ("modelopt_fp8", "static", "")
    source = config_of(exports(name).export)["quantization_config"]
    assert set(source["ignore"]) <= set(rules.spec["ignore"]) == set(sorted(rules.spec["ignore"]))
    assert rules.spec["config_groups"] == source["config_groups"] and rules.spec["producer"] == source["producer"]
    if name in ("flux2", "qwen"):  # checkpoint names are those of SGLang's model, so ignore must separate the layers
        assert not any(rules.excluded(module) for module in rules.layers("F8_E4M3"))
        plain = {re.sub(r"(img|txt)_mod\.1$", r"\1_mod", module) for module in rules.plain()}
        assert len(plain) > 5 and [module for module in plain if not rules.excluded(module)] == []


@pytest.mark.parametrize("name", ["flux1", "flux2", "wan", "hunyuan", "qwen"])
def test_bytes_and_error(name, exports, built):
    """Quantized layers are ModelOpt's bytes and scales, all others the base's bits; error within the format's bound."""
    case, tensors = exports(name), stored(built(name).folder)
    source, base, values = stored(case.export), stored(case.base), dequantize(stored(built(name).folder))
    assert values.keys() == base.keys()
    for key, weight in base.items():
        if tensors[key].dtype == torch.float8_e4m3fn:
            assert same_bits(tensors[key], source[key])
            for leaf in ("weight_scale", "input_scale"):
                scale = key.replace(".weight", f".{leaf}")
                assert torch.equal(tensors[scale], source[scale].reshape(1)) and tensors[scale].dtype == torch.float32
        else:
            assert torch.equal(tensors[key], weight) and tensors[key].dtype == torch.bfloat16, key
    codes = [key for key in base if tensors[key].dtype == torch.float8_e4m3fn]
    # of all quantized weights together: ModelOpt divides in BF16, which alone moves a small layer's error to 0.0271
    assert rel_l2(*(torch.cat([t[key].flatten() for key in codes]) for t in (values, base))) <= E4M3_ERROR


@pytest.mark.parametrize("name", ["flux1", "flux2", "wan", "hunyuan", "qwen"])
def test_loads_with_parity(name, built):
    """The normal path, weights dequantized for every matmul, against diffusers in F32 on the decoded weights."""
    family = MODELS[name][0]
    folder = built(name).folder
    with qwen_image.small_widths() if name == "qwen" else nullcontext():
        loaded = model.load(model.Request(str(folder), compute="dequantize", dtype="fp32"))
    assert loaded.description.formats["FP8"] == WIDE[name][0] and loaded.description.family == "modelopt-fp8"
    decoded = family.emulate(dequantize(stored(folder)), config_of(folder))
    inputs = family.inputs()
    assert rel_l2(family.comfy_velocity(loaded.patcher, **inputs), family.diffusers_velocity(decoded, **inputs)) < 1e-4


def test_the_exports_own_scales_are_enough(exports, built, tmp_path):
    """No backbone.pt: the same bytes. In several shards: the same tensors, and each header declares everything."""
    case = exports("flux1")
    found = build_fp8(modelopt_hf_dir=str(case.export), base_transformer_dir=str(case.base),
                      output_dir=str(tmp_path / "out"), shard_bytes=1 << 21)
    assert found.statistics["output_shards"] == len(list(found.folder.glob("*.safetensors"))) > 2
    ours, whole = stored(found.folder), stored(built("flux1").folder)
    assert ours.keys() == whole.keys()
    assert all(same_bits(ours[key], whole[key]) for key in whole)
    assert Rules(found.folder).refused == "" and numbers(found.statistics) == TABLE["flux1"]


def test_sharded_export_as_override_of_its_base(tiny, tmp_path):
    found = build_fp8(modelopt_hf_dir=str(tiny.sharded), base_transformer_dir=str(tiny.pipeline),
                      output_dir=str(tmp_path / "out"))
    assert numbers(found.statistics) == TABLE["flux1"] and found.statistics["output_shards"] == 1
    base = model.defer(model.Request(str(tiny.pipeline))).patcher
    report = model.override(base, model.Request(str(found.folder))).report
    assert "33 FP8" in report and "override as component" in report


@pytest.mark.parametrize("name", ["flux1", "flux2", "wan", "hunyuan", "qwen"])
def test_straight_from_bf16(name, exports, tmp_path):
    """scale = amax / 448, codes by F32 division; the preset and what ModelOpt's examples leave alone stay as they are."""
    base = exports(name).base
    found = build_fp8(base_transformer_dir=str(base), output_dir=str(tmp_path / "out"))
    tensors, weights = stored(found.folder), stored(base)
    quantized = {key for key in weights if tensors[key].dtype == torch.float8_e4m3fn}
    assert len(quantized) == found.statistics["quantized_weights"] == found.statistics["added_scale_tensors"] >= 20
    assert found.statistics["bf16_fallback_weights"] == WIDE[name][1]
    assert not any(key.startswith(("proj_out", "norm_out", "x_embedder", "img_in", "patch_embedding", "condition_"))
                   for key in quantized)
    for key, weight in weights.items():
        if key not in quantized:
            assert torch.equal(tensors[key], weight)
            continue
        scale = weight.abs().max().float() / 448
        assert torch.equal(tensors[key.replace(".weight", ".weight_scale")], scale.reshape(1))
        codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert same_bits(tensors[key], codes)
        assert rel_l2(codes.float() * scale, weight) <= E4M3_ERROR
    rules = Rules(found.folder)
    assert (rules.method, rules.kind, rules.refused) == ("fp8", "dynamic", "")
    with qwen_image.small_widths() if name == "qwen" else nullcontext():
        description = model.load(model.Request(str(found.folder))).description
    assert description.family == "fp8" and description.dynamic_activations == len(quantized)


def test_command_line(exports, built, tmp_path):
    """Statistics as pure JSON, the same bytes as the function's, one message for what is refused; without ComfyUI."""
    case = exports("flux1")
    arguments = ["build-fp8", "--modelopt-hf-dir", case.export.parent, "--modelopt-backbone-ckpt", case.backbone,
                 "--base-transformer-dir", case.base, "--output-dir", tmp_path / "out", "--json"]

    def run() -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
        return subprocess.run([sys.executable, str(PACK), *map(str, arguments)], capture_output=True, text=True,
                              env=environment, check=False, cwd=tmp_path)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == built("flux1").statistics and "100 %" in done.stderr
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (built("flux1").folder / name).read_bytes()
    done = run()
    assert done.returncode == 1 and not done.stdout and "the output folder is not empty" in done.stderr
    assert "Traceback" not in done.stderr and COMFYUI.exists()


def test_nvfp4_statistics_and_bytes(tiny, tmp_path):
    found = build_nvfp4(modelopt_hf_dir=str(tiny.nvfp4), base_transformer_dir=str(tiny.pipeline),
                        pattern_preset="flux1-nvfp4", output_dir=str(tmp_path / "out"))
    assert found.statistics == {"fallback_modules": 16, "replaced_tensors": 32, "removed_aux_tensors": 48,
                                "output_shards": 1, "swap_weight_nibbles": False}
    tensors, source, base = stored(found.folder), stored(tiny.nvfp4), stored(tiny.bf16)
    replaced = {key for key in tensors if tensors[key].dtype != source[key].dtype}
    assert len(replaced) == 16 and all(torch.equal(tensors[key], base[key]) for key in replaced)
    assert all(same_bits(tensors[key], source[key]) for key in tensors.keys() - replaced)
    assert len(source) - len(tensors) == 48
    values = dequantize(tensors)
    assert values.keys() == base.keys()
    errors = {key: rel_l2(values[key], base[key]) for key in base if tensors[key].dtype == torch.uint8}
    assert len(errors) == 47 - 16 and max(errors.values()) <= 0.10
    rules = Rules(found.folder)
    assert (rules.method, rules.kind, rules.refused) == ("modelopt_fp4", "low first", "")
    assert rules.spec["ignore"][:3] == config_of(tiny.nvfp4)["quantization_config"]["ignore"]
    assert rules.spec["ignore"][3] == "transformer_blocks.*.norm1.linear*"
    family = MODELS["flux1"][0]
    loaded = model.load(model.Request(str(found.folder), compute="dequantize", dtype="fp32"))
    decoded = family.emulate(values, config_of(found.folder))
    inputs = family.inputs()
    assert rel_l2(family.comfy_velocity(loaded.patcher, **inputs), family.diffusers_velocity(decoded, **inputs)) < 1e-4


@pytest.mark.parametrize("high_first", [False, True])
def test_nvfp4_straight_from_bf16_is_modelopts_export(tiny, tmp_path, high_first):
    """Weights, block scales and tensor scales (q, k and v share theirs) are nvidia-modelopt's, byte for byte."""
    found = build_nvfp4(base_transformer_dir=str(tiny.bf16), output_dir=str(tmp_path / "out"),
                        swap_weight_nibbles=high_first)
    tensors, source, base = stored(found.folder), stored(tiny.nvfp4), stored(tiny.bf16)
    quantized = [key for key in tensors if tensors[key].dtype == torch.uint8]
    # 50 Linear layers without proj_out, x_embedder, context_embedder, norm_out and six of time_text_embed
    assert len(quantized) == found.statistics["quantized_weights"] == 40
    for key in quantized:
        if key.endswith("single_transformer_blocks.0.proj_out.weight") or key not in source \
                or source[key].dtype != torch.uint8:
            continue
        codes = tensors[key] >> 4 | tensors[key] << 4 if high_first else tensors[key]
        assert torch.equal(codes, source[key]), key
        for leaf in ("weight_scale", "weight_scale_2"):
            name = key.replace(".weight", f".{leaf}")
            assert same_bits(tensors[name], source[name])
    assert sum(source[key].dtype == torch.uint8 for key in quantized) == 38  # both proj_out stay BF16 in the export
    if not high_first:
        values = dequantize(tensors)
        assert max(rel_l2(values[key], base[key]) for key in quantized) <= 0.10
    rules = Rules(found.folder)
    assert (rules.kind, rules.refused) == ("swapped" if high_first else "low first", "")
    description = model.load(model.Request(str(found.folder))).description
    assert description.byte_order.low_first is not high_first and description.dynamic_activations == 40


def test_nodes(tiny, tmp_path):
    """The nodes make what the functions make, and answer before a prompt is queued."""
    from quantized_transformers.nodes.build_quantized import QT_BuildFP8Transformer, QT_BuildNVFP4Transformer

    made = QT_BuildFP8Transformer.execute(str(tiny.fp8), "", str(tiny.pipeline), str(tmp_path / "fp8"), "auto",
                                          "time_text_embed\n\n^nothing$\n", 448.0, "2MB", False)
    assert "quantized_weights 27, bf16_fallback_weights 20" in made.args[0]
    assert "these patterns match no layer: ^nothing$" in made.args[0]
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 2
    made = QT_BuildNVFP4Transformer.execute(str(tiny.nvfp4), str(tiny.bf16), str(tmp_path / "fp4"), "flux1-nvfp4",
                                            "", False, "5GB", False)
    assert "fallback_modules 16, replaced_tensors 32, removed_aux_tensors 48" in made.args[0]
    check = QT_BuildFP8Transformer.validate_inputs
    inputs, new = {"modelopt_export": str(tiny.fp8), "base": str(tiny.pipeline)}, str(tmp_path / "new")
    assert check(**inputs, output=new, keep_bf16_patterns="a\n(b)?", max_shard_size="5GB") is True
    assert "no regular expression" in check(**inputs, keep_bf16_patterns="a\n(")
    assert "is no size of a file" in check(**inputs, max_shard_size="5XB")
    assert "the output folder is not empty" in check(**inputs, output=str(tmp_path / "fp8"))
    assert check(**inputs, output=str(tmp_path / "fp8"), overwrite=True) is True
    assert "lie in each other" in check(**inputs, output=str(tiny.pipeline / "new")) and not (tmp_path / "new").exists()
    assert "no output folder is given" in check(**inputs, output=" ")
    assert "neither a ModelOpt export nor a base" in QT_BuildNVFP4Transformer.validate_inputs(output=new)
    assert check(modelopt_export=None, base="", output=None) is True, "known when it runs"
    assert "there is no such file or folder" in check(backbone=str(tmp_path / "nothing"))
    assert "there is no such file or folder" in QT_BuildNVFP4Transformer.validate_inputs(base=str(tmp_path / "nothing"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """At most two of the largest tensors and 200 MB, whatever the size: 0.8 GB of BF16 would not fit."""
    base = bench_build.bf16_base(tmp_path / "base", 24, 4096, 4096, random=False)
    grown = bench.child(bench_build.building_memory, tmp_path, base)
    assert grown < 2 * 4096 * 4096 * 2 + 200e6 < 0.4 * (base / "diffusion_pytorch_model.safetensors").stat().st_size

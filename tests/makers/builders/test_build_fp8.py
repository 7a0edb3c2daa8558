"""build-fp8 on small synthetic models: its rules, options and presets. What it refuses: test_build_fp8_refused.py."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders import component
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.presets import MODEL_TYPES, preset_of, variants
from support.build_fp8 import FLUX, LAYERS, QUANTIZED, Models, numbers
from support.common import config_of, save, stored

pytestmark = pytest.mark.unit


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_the_order_of_the_rules(models):
    """Quantizer state is dropped; fallback before ignored, weight and bias from the base; then ignored; then FP8."""
    models.backbone()
    models.config["quantization_config"]["ignore"] = ["proj_out", "transformer_blocks.*.norm1*"]
    for name in LAYERS:
        models.export[f"{name}.weight_quantizer._amax"] = torch.ones(())
        models.export[f"{name}.bias"] = torch.zeros_like(models.base[f"{name}.bias"])
    models.export["transformer_blocks.0.norm1.linear.weight"] *= 0
    found = models.build()
    assert found.statistics == {"quantized_weights": 2, "bf16_fallback_weights": 2, "preserved_ignored_weights": 2,
                                "added_scale_tensors": 4, "output_shards": 1}
    tensors = stored(found.folder)
    assert not any("_quantizer" in name for name in tensors)
    for name in ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.ff.net.2"):
        for leaf in ("weight", "bias"):
            assert torch.equal(tensors[f"{name}.{leaf}"], models.base[f"{name}.{leaf}"])
    assert torch.equal(tensors["proj_out.weight"], models.base["proj_out.weight"]) and not tensors["proj_out.bias"].any()
    for name in QUANTIZED:
        scale = models.amax[name][0].float() / 448
        codes = (models.base[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale"], scale.reshape(1))
        assert torch.equal(tensors[f"{name}.input_scale"], torch.tensor([3.5 / 448]))
    quantization = config_of(found.folder)["quantization_config"]
    # norms without an amax, the spelling of SGLang for ff.net.2, and the source's own patterns
    assert quantization["ignore"] == ["proj_out", "transformer_blocks.*.norm1*", "transformer_blocks.0.attn.norm_q",
                                      "transformer_blocks.0.ff.proj_out", "transformer_blocks.0.norm1.linear"]
    assert quantization["quant_type"] == "FP8"


def test_scales_beyond_the_weight_are_clamped(models):
    """An amax below the weight's own (percentile calibration) saturates; torch's bare cast would give NaN."""
    models.amax = {name: (weight / 2, inner) for name, (weight, inner) in models.amax.items()}
    models.backbone()
    for name in QUANTIZED:
        values = stored(models.build(overwrite=True).folder)[f"{name}.weight"].float()
        assert not values.isnan().any() and values.abs().max() == 448


def test_only_two_dimensions_are_quantized(models):
    for tensors in (models.base, models.export):
        tensors["patch_embedding.weight"] = torch.randn(32, 4, 1, 2, 2).bfloat16()
    models.amax["patch_embedding"] = (torch.tensor(4.0), torch.tensor(4.0))
    models.backbone()
    found = models.build()
    assert stored(found.folder)["patch_embedding.weight"].dtype == torch.bfloat16
    assert "patch_embedding.weight has 5 dimensions and stays BF16" in found.report
    assert "patch_embedding" in config_of(found.folder)["quantization_config"]["ignore"]
    assert numbers(found) == (2, 2, 3)


def test_amax_left_in_the_export_and_bf16_weights_with_scales(models):
    """Two older forms of exports: quantizer state beside BF16 weights, and scales beside BF16 weights."""
    for name, (weight, inner) in models.amax.items():
        models.export[f"{name}.weight_quantizer._amax"], models.export[f"{name}.input_quantizer._amax"] = weight, inner
    first = stored(models.build().folder)
    models.export = {key: value for key, value in models.export.items() if "_quantizer" not in key}
    models.own_scales(codes=False)
    second = stored(models.build(overwrite=True).folder)
    assert first.keys() == second.keys() and len(first) == len(models.base) + 4
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


def test_options(models):
    models.own_scales()
    found = models.build(base=False, model_type="none")
    assert numbers(found) == (4, 0, 2)  # FP8 weights need no base
    found = models.build(model_type="none", keep_bf16_patterns=[r"\.attn\.to_[qk]$", "nothing"], overwrite=True)
    assert numbers(found) == (2, 2, 2) and "these patterns match no layer: nothing" in found.report
    models.export = {key: value.clone() for key, value in models.base.items()}
    models.backbone()
    scale = stored(models.build(maxbound=240.0, overwrite=True).folder)[f"{QUANTIZED[0]}.weight_scale"]
    assert torch.equal(scale, (models.amax[QUANTIZED[0]][0].float() / 240).reshape(1))
    assert numbers(models.build(export=False, modelopt_backbone_ckpt="", overwrite=True)) == (2, 2, 2)


def test_spans_do_not_matter(models, monkeypatch):
    """Weights in many spans over several threads: the same bytes."""
    whole = stored(models.build(export=False).folder)
    monkeypatch.setattr(component, "SPAN", 96)
    split = stored(models.build(export=False, overwrite=True).folder)
    assert whole.keys() == split.keys() and models.base[f"{QUANTIZED[0]}.weight"].numel() > 10 * 96
    assert all(torch.equal(whole[key].view(torch.uint8), split[key].view(torch.uint8)) for key in whole)
    models.base[f"{QUANTIZED[0]}.weight"][-1, -1] = float("nan")
    models.options["output_dir"] += "2"
    with pytest.raises(CheckpointError, match=r"to_q\.weight holds NaN"):
        models.build(export=False)


def test_nothing_works_on_after_a_cancel(monkeypatch):
    """What is under way is waited for, what waits is dropped: nobody writes to a file that is closed."""
    monkeypatch.setattr(component, "SPAN", 1)
    done = []

    def work(start: int, count: int) -> int:
        time.sleep(0.02)
        done.append(start)
        return start

    with closing(component.in_spans(400, work)) as spans:
        assert [next(spans), next(spans)] == [0, 1]
    seen = list(done)
    time.sleep(0.1)
    assert done == seen and 2 <= len(seen) < 40
    with pytest.raises(ZeroDivisionError):
        list(component.in_spans(400, lambda start, count: (time.sleep(0.02), done.append(start), 1 // (start - 3))))
    seen = list(done)
    time.sleep(0.1)
    assert done == seen and len(seen) < 80


def test_threads_of_others_keep_their_number():
    """The builders' threads compute alone; this thread, and those to come, as before."""
    before = torch.get_num_threads()
    component._threads.cache_clear()
    assert set(component._threads().map(lambda _: torch.get_num_threads(), range(8))) == {1}
    with ThreadPoolExecutor(1) as another:
        assert before == torch.get_num_threads() == another.submit(torch.get_num_threads).result()


def test_presets_and_names():
    """auto goes by class; HunyuanVideo's names are mapped onto SGLang's for patterns and ignore
    (docs/sources/sglang.md, "HunyuanVideo's names")."""
    for name, class_name in (("flux1", FLUX), ("flux2", "Flux2Transformer2DModel"),
                             ("hunyuan-video", "HunyuanVideoTransformer3DModel"), ("wan22", "WanTransformer3DModel"),
                             ("qwen-image", "QwenImageTransformer2DModel"), ("none", "Other")):
        assert preset_of("auto", class_name).name == name and name in MODEL_TYPES
        assert name == "none" or preset_of(name, class_name).class_name == class_name
    table = {"context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.fc_in",
             "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.fc_out",
             "context_embedder.proj_in": "txt_in.input_embedder", "x_embedder.proj": "img_in.proj",
             "context_embedder.token_refiner.refiner_blocks.1.norm2": "txt_in.refiner_blocks.1.norm2",
             "context_embedder.token_refiner.refiner_blocks.0.attn.to_k": "txt_in.refiner_blocks.0.self_attn_qkv",
             "context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0": "txt_in.refiner_blocks.0.self_attn_proj",
             "context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj": "txt_in.refiner_blocks.0.mlp.fc_in",
             "context_embedder.token_refiner.refiner_blocks.0.ff.net.2": "txt_in.refiner_blocks.0.mlp.fc_out",
             "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear":
                 "txt_in.refiner_blocks.0.adaLN_modulation.linear",
             "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.fc_out",
             "time_text_embed.text_embedder.linear_1": "vector_in.fc_in",
             "transformer_blocks.12.norm1_context.linear": "double_blocks.12.txt_mod.linear",
             "transformer_blocks.3.attn.norm_added_k": "double_blocks.3.txt_attn_k_norm",
             "transformer_blocks.3.attn.to_v": "double_blocks.3.img_attn_qkv",
             "transformer_blocks.3.attn.add_q_proj": "double_blocks.3.txt_attn_qkv",
             "transformer_blocks.3.attn.to_out.0": "double_blocks.3.img_attn_proj",
             "transformer_blocks.3.attn.to_add_out": "double_blocks.3.txt_attn_proj",
             "transformer_blocks.3.ff.net.0.proj": "double_blocks.3.img_mlp.fc_in",
             "transformer_blocks.3.ff_context.net.2": "double_blocks.3.txt_mlp.fc_out",
             "single_transformer_blocks.7.attn.norm_q": "single_blocks.7.q_norm",
             "single_transformer_blocks.7.proj_mlp": "single_blocks.7.linear1",
             "single_transformer_blocks.7.proj_out": "single_blocks.7.linear2",
             "single_transformer_blocks.7.norm.linear": "single_blocks.7.modulation.linear",
             "norm_out.linear": "final_layer.adaLN_modulation.linear", "proj_out": "final_layer.linear"}
    for stored_name, runtime in table.items():
        assert variants(stored_name, "HunyuanVideoTransformer3DModel")[-1] == runtime
    assert variants("transformer_blocks.0.img_mod.1", "Q")[-1] == "transformer_blocks.0.img_mod"
    assert variants("transformer_blocks.0.ff_context.net.2", FLUX) == ("transformer_blocks.0.ff_context.net.2",)


def test_deep_wan_models_leave_their_outer_blocks_alone(tmp_path):
    """ModelOpt's Wan filter names blocks by number: it is used for models of 30 blocks and more."""
    tensors = {f"blocks.{i}.ffn.net.2.weight": torch.randn(8, 8).bfloat16() for i in range(40)}
    save(tmp_path / "base", tensors, {"_class_name": "WanTransformer3DModel"})
    found = build_fp8(base_transformer_dir=str(tmp_path / "base"), output_dir=str(tmp_path / "out"))
    kept = {int(name.split(".")[1]) for name, t in stored(found.folder).items() if t.dtype == torch.bfloat16}
    assert kept == {0, 1, 2, 37, 38, 39} and numbers(found) == (34, 0, 6)
    assert json.loads((found.folder / "config.json").read_text())["quantization_config"]["activation_scheme"] == "dynamic"

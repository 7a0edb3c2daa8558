"""build-fp8 on small synthetic models: the order of its rules, and one named error for everything that is wrong."""

from __future__ import annotations

import json
import pickle
import re
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from support.common import config_of, save, stored
from support.pack import start_comfy

start_comfy()

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders import backbone as backbones
from quantized_transformers.makers.builders import component
from quantized_transformers.makers.builders.fp8 import build_fp8
from quantized_transformers.makers.builders.presets import MODEL_TYPES, preset_of, variants

FLUX = "FluxTransformer2DModel"
LAYERS = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.0.attn.to_k": (32, 32),
          "transformer_blocks.0.norm1.linear": (64, 32), "transformer_blocks.0.ff.net.2": (32, 48), "proj_out": (16, 32)}
QUANTIZED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
QUANTIZATION = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["proj_out"]}


class Models:
    """A BF16 base, an export of it with BF16 weights and ModelOpt's scales, and a backbone.pt, to be changed."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root = root
        self.base = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in LAYERS.items()}
        self.base |= {f"{name}.bias": torch.randn(shape[0]).bfloat16() for name, shape in LAYERS.items()}
        self.base["transformer_blocks.0.attn.norm_q.weight"] = torch.ones(16, dtype=torch.bfloat16)
        self.export = {key: value.clone() for key, value in self.base.items()}
        self.amax = {name: (self.base[f"{name}.weight"].abs().max(), torch.tensor(3.5)) for name in LAYERS
                     if name != "proj_out"}
        self.base_config, self.config = {"_class_name": FLUX}, {"_class_name": FLUX,
                                                                "quantization_config": dict(QUANTIZATION)}
        self.options: dict = {"output_dir": str(root / "out")}

    def own_scales(self, codes: bool = True) -> None:
        """Let the export carry its scales, and FP8 weights."""
        for name, (weight, inner) in self.amax.items():
            scale = weight.float() / 448
            self.export[f"{name}.weight_scale"], self.export[f"{name}.input_scale"] = scale, inner / 448
            if codes:
                self.export[f"{name}.weight"] = (self.base[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)

    def backbone(self) -> None:
        """Let the scales be in a backbone.pt."""
        state = {}
        for name, (weight, inner) in self.amax.items():
            state |= {f"{name}.weight_quantizer._amax": weight, f"{name}.input_quantizer._amax": inner}
        (self.root / "ckpt").mkdir()
        torch.save({"modelopt_state": {"version": "0.47.0"}, "model_state_dict": state}, self.root / "ckpt" / "backbone.pt")
        self.options["modelopt_backbone_ckpt"] = str(self.root / "ckpt")

    def build(self, base: bool = True, export: bool = True, **options):
        if base:
            options["base_transformer_dir"] = str(save(self.root / "base", self.base, self.base_config))
        if export:
            options["modelopt_hf_dir"] = str(save(self.root / "hf" / "transformer", self.export, self.config).parent)
        return build_fp8(**self.options | options)

    def refused(self, match: str, **options) -> str:
        """The build is refused with this message, and nothing is there that would load."""
        with pytest.raises(CheckpointError, match=match) as error:
            self.build(**options)
        assert not (self.root / "out").exists()
        assert "what to do" in str(error.value)
        return str(error.value)


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


def numbers(found) -> tuple[int, int, int]:
    return tuple(found.statistics[key] for key in ("quantized_weights", "bf16_fallback_weights",
                                                   "preserved_ignored_weights"))


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


REFUSED = {
    "class": (lambda m: m.base_config.update(_class_name="QwenImageTransformer2DModel"),
              "the base is QwenImageTransformer2DModel, but the export is FluxTransformer2DModel"),
    "shape": (lambda m: m.base.update({"proj_out.weight": torch.zeros(16, 64).bfloat16()}),
              r"proj_out\.weight is \[16, 64\] in the base, \[16, 32\] in the export"),
    "fallback missing": (lambda m: m.base.pop("transformer_blocks.0.norm1.linear.weight"),
                         r"transformer_blocks\.0\.norm1\.linear\.weight is not in the base"),
    "fallback bias missing": (lambda m: m.base.pop("transformer_blocks.0.norm1.linear.bias"),
                              r"norm1\.linear\.bias is not in the base"),
    "base quantized": (lambda m: m.base.update({"proj_out.weight": torch.zeros(16, 32).to(torch.float8_e4m3fn)}),
                       r"proj_out\.weight is F8_E4M3 in the base"),
    "scale missing": (lambda m: m.export.pop("transformer_blocks.0.attn.to_q.weight_scale"),
                      r"attn\.to_q\.weight is FP8, but its weight_scale or input_scale is missing"),
    "input scale missing": (lambda m: m.export.pop("transformer_blocks.0.attn.to_q.input_scale"),
                            r"attn\.to_q\.weight is FP8, but its weight_scale or input_scale is missing"),
    "scale zero": (lambda m: m.export["transformer_blocks.0.attn.to_q.weight_scale"].zero_(),
                   r"to_q\.weight_scale is \[0\.0\] \[\], expected one positive number"),
    "scale by row": (lambda m: m.export.update({"transformer_blocks.0.attn.to_q.weight_scale": torch.ones(32)}),
                     r"to_q\.weight_scale is .* expected one positive number"),
    "scale NaN": (lambda m: m.export["transformer_blocks.0.attn.to_q.input_scale"].fill_(float("nan")),
                  r"to_q\.input_scale holds NaN"),
    "code NaN": (lambda m: m.export["transformer_blocks.0.attn.to_q.weight"].view(torch.uint8)[3, 3].fill_(0xFF),
                 r"to_q\.weight holds NaN"),
    "bias NaN": (lambda m: m.export["proj_out.bias"].fill_(float("nan")), r"proj_out\.bias holds NaN"),
    "base infinite": (lambda m: m.base["transformer_blocks.0.norm1.linear.weight"][1].fill_(float("inf")),
                      r"norm1\.linear\.weight holds infinite values"),
    "ignored but FP8": (lambda m: m.config["quantization_config"].update(ignore=["transformer_blocks.0.attn.to_q"]),
                        r"to_q\.weight is on the list of layers left alone, but stored as FP8"),
    "smoothed": (lambda m: m.export.update({"transformer_blocks.0.attn.to_q.pre_quant_scale": torch.ones(32)}),
                 r"to_q\.pre_quant_scale: smoothed activations"),
    "method": (lambda m: m.config["quantization_config"].update(quant_method="compressed-tensors"),
               "quant_method is 'compressed-tensors', not 'modelopt'"),
    "algorithm": (lambda m: m.config["quantization_config"].update(quant_algo="NVFP4"), "quant_algo is 'NVFP4', not 'FP8'"),
    "unloadable algorithm": (lambda m: m.config["quantization_config"].update(quant_algo="FP8_PB_WO"),
                             "quant_algo is 'FP8_PB_WO', not 'FP8'"),
    "not quantized": (lambda m: m.config.pop("quantization_config"), "config.json has no quantization_config"),
    "no scales": (lambda m: [m.export.pop(key) for key in list(m.export) if "_scale" in key],
                  "the export carries no scales"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refuses_an_export(models, what):
    change, match = REFUSED[what]
    models.own_scales()
    models.build(output_dir=str(models.root / "good"))  # without the change it is right
    change(models)
    models.refused(match)


def test_refuses_weights_of_a_base(models):
    for value, word in ((float("nan"), "NaN"), (float("-inf"), "infinite")):
        models.base["transformer_blocks.0.attn.to_k.weight"][31, 31] = value
        message = models.refused(rf"transformer_blocks\.0\.attn\.to_k\.weight holds {word}", export=False)
        assert "diffusion_pytorch_model.safetensors" in message
    models.base = {f"blocks.{i}.proj.weight": torch.randn(16, 16).bfloat16() for i in range(2)}
    models.base_config = {"_class_name": "SomeTransformer"}
    models.refused("there is no preset for SomeTransformer", export=False)
    assert numbers(models.build(export=False, model_type="none")) == (2, 0, 0)


def test_refuses_options(models, tmp_path):
    models.own_scales()
    for options, match in (({"maxbound": 0.0}, "maxbound is 0"), ({"maxbound": 500.0}, "maxbound is 500"),
                           ({"model_type": "sdxl"}, "unknown model type 'sdxl'"),
                           ({"model_type": "qwen-image"}, "model type qwen-image is for QwenImageTransformer2DModel"),
                           ({"keep_bf16_patterns": ["("]}, r"'\(' is no regular expression"),
                           ({"base": False}, "2 layers are to be kept in BF16, which only the base has"),
                           ({"base": False, "export": False}, "neither a ModelOpt export nor a base"),
                           ({"output_dir": " "}, "no output folder is given"),
                           ({"output_dir": str(tmp_path / "base" / "out")}, "lie in each other"),
                           ({"modelopt_backbone_ckpt": str(tmp_path)}, "there is no backbone.pt"),
                           ({"export": False, "modelopt_backbone_ckpt": str(tmp_path)}, "without its export")):
        models.refused(match, **options)
    models.build()
    with pytest.raises(CheckpointError, match="the output folder is not empty"):
        models.build()


def test_refuses_ambiguous_files(models):
    models.own_scales()
    save(models.root / "hf" / "transformer", {"other.weight": torch.zeros(2, 2)}, None, name="other.safetensors")
    models.refused("2 weight files without an index")
    (models.root / "hf" / "transformer" / "other.safetensors").unlink()
    (models.root / "base").mkdir(exist_ok=True)
    models.base_config = None
    (models.root / "base" / "config.json").unlink()
    models.refused("there is no config.json beside the weights")


def test_wan22_is_for_the_first_transformer(tmp_path):
    tensors = {"blocks.0.attn1.to_q.weight": torch.randn(16, 16).bfloat16()}
    for part in ("transformer", "transformer_2"):
        save(tmp_path / "wan" / part, tensors, {"_class_name": "WanTransformer3DModel"})
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    found = build_fp8(base_transformer_dir=str(tmp_path / "wan"), output_dir=str(tmp_path / "out"))
    assert numbers(found) == (1, 0, 0) and "preset wan22" in found.report
    second = {"base_transformer_dir": str(tmp_path / "wan" / "transformer_2"), "output_dir": str(tmp_path / "out2")}
    with pytest.raises(CheckpointError, match="model type wan22 is for the pipeline's first transformer"):
        build_fp8(**second)
    assert numbers(build_fp8(**second, model_type="none")) == (1, 0, 0)


def test_refuses_a_backbone_of_another_export(models):
    models.own_scales()
    models.amax = {name: (weight * 1.5, inner) for name, (weight, inner) in models.amax.items()}
    models.backbone()
    models.refused(r"to_[qk]\.weight_scale is .* in the export, .* by the backbone")


def test_an_fp8_export_is_not_scaled_anew(models):
    """FP8 codes without scales were made with 448; another maxbound would scale them wrongly."""
    models.own_scales()
    models.export = {key: value for key, value in models.export.items() if "_scale" not in key}
    models.backbone()
    models.refused("is FP8 already, made with 448", maxbound=240.0)
    scale = stored(models.build().folder)[f"{QUANTIZED[0]}.weight_scale"]
    assert torch.equal(scale, (models.amax[QUANTIZED[0]][0].float() / 448).reshape(1))


class Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return (Path.touch, (self.touched,))


def test_a_pickle_is_never_run(models, tmp_path):
    """Anything that names other code is refused before torch reads it, whatever torch was told to trust."""
    models.backbone()
    path = models.root / "ckpt" / "backbone.pt"
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    torch.save({**state, "extra": Evil(tmp_path / "it ran")}, path)
    torch.serialization.add_safe_globals([Path.touch, Path])
    try:
        models.refused("this pickle names code .*, so it is not read: .*pathlib PosixPath")
    finally:
        torch.serialization.clear_safe_globals()
    for content, match in ((pickle.dumps(Evil(tmp_path / "it ran")), "no checkpoint that torch.save wrote"),
                           (good[:len(good) // 2], "no checkpoint that torch.save wrote"), (b"", "no checkpoint")):
        path.write_bytes(content)
        models.refused(match)
    torch.save(state["model_state_dict"], path)
    models.refused("holds no model_state_dict")
    torch.save({"model_state_dict": {"x.weight": torch.zeros(1)}}, path)
    models.refused("holds no calibrated amax")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/second.pkl", pickle.dumps({}, protocol=2))
    models.refused("no checkpoint that torch.save wrote|names code")
    for amax, match in ((torch.tensor(float("nan")), "_amax is nan"), (torch.tensor(-1.0), "_amax is -1"),
                        (torch.ones(32), r"_amax is \[32\]: only one scale a tensor")):
        torch.save({"model_state_dict": {**state["model_state_dict"], f"{QUANTIZED[0]}.weight_quantizer._amax": amax}}, path)
        models.refused(match)
    assert not (tmp_path / "it ran").exists()
    assert all(re.fullmatch(r"(torch|collections)[._a-z]* \w+", name) for name in backbones.ALLOWED)


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

"""build-fp8: one named error for everything that is wrong, and a pickle that is never run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.builders import backbone as backbones
from quantized_transformers.makers.builders.fp8 import build_fp8
from support.build_fp8 import QUANTIZED, Models, numbers
from support.common import save, stored

pytestmark = pytest.mark.unit


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


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
    for model_type in ("auto", "none"):  # no preset: what its names tell
        assert numbers(models.build(export=False, model_type=model_type, overwrite=True)) == (2, 0, 0)
    models.base = {f"blocks.0.{name}.weight": torch.randn(16, 16).bfloat16() for name in ("norm1.linear", "img_mod.1")}
    with pytest.raises(CheckpointError, match="there is nothing to quantize"):
        models.build(export=False, overwrite=True)


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

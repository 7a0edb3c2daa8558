"""What is done with a model that only the host knows: its forward, LoRA, overrides and saving; and what a file tells of it
otherwise than by names and sizes: headers, marks, values."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.host import model_identity
from quantized_transformers.loaders import model
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from support import common, host_models, host_sizes
from support.passthrough import (
    RUN,
    WHOLE,
    agrees,
    file_of,
    forward,
    load,
    same_model,
    stock,
    stock_patcher,
    stored_as,
    weights,
)
from support.real_files import lora_agrees

pytestmark = pytest.mark.parity


def header_file(name, folder):
    """A file in FP8 with its header."""
    stored, _ = stored_as(name, host_models.make(name), "FP8")
    return common.save(folder, stored, None, host_models.metadata_of(name), "model.safetensors") / "model.safetensors"


@pytest.mark.parametrize("form", ["BF16", "FP8", "NVFP4, ModelOpt", "ConvRot"])
@pytest.mark.parametrize("name", RUN)
def test_forward(name, form, tmp_path):
    path, truth = file_of(name, form, tmp_path)
    loaded = load(path, compute="dequantize", byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
    assert common.rel_l2(forward(loaded.patcher, name), forward(stock_patcher(truth), name)) < 1e-5


@pytest.mark.parametrize("name", RUN)
def test_lora(name, tmp_path):
    """By the host's own keys, on quantized weights: in low VRAM exactly W + B A, fully loaded the same effect."""
    path, truth = file_of(name, "FP8", tmp_path)
    loaded = load(path, dtype="default")
    lora_agrees(loaded, truth, tmp_path / "lora", sorted(loaded.description.layers)[::5],
                lambda patcher, load_it=True: forward(patcher, name, load_it),
                lambda wanted: forward(stock_patcher(wanted), name))


@pytest.mark.parametrize("name", RUN)
def test_override_of_any_base(name, tmp_path):
    """Behind a MODEL of this pack and of ComfyUI's own loader; another model's is refused."""
    path, truth = file_of(name, "FP8", tmp_path / "fp8")
    plain, _ = file_of(name, "BF16", tmp_path / "bf16")
    wanted = forward(stock_patcher(truth), name)
    for base in (load(plain).patcher, stock_patcher(host_models.make(name))):
        made = model.override(base, model.Request(str(path), compute="dequantize"))
        assert common.rel_l2(forward(made.patcher, name), wanted) < (1e-5 if base.get_attachment("quantized_transformers") else 0.02)
    other = RUN[RUN.index(name) - 1]
    with pytest.raises(CheckpointError, match="the override is"):
        model.override(load(file_of(other, "BF16", tmp_path / "other")[0]).patcher, model.Request(str(path)))


@pytest.mark.parametrize("form", ["FP8", "NVFP4, ModelOpt", "ConvRot"])
@pytest.mark.parametrize("how", ["exact", "stock"])
def test_saved_and_loaded_again(how, form, tmp_path, output):
    from quantized_transformers.makers.save import save

    name = "SD3.5 M"
    loaded = load(file_of(name, form, tmp_path)[0], compute="dequantize",
                  byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
    before = forward(loaded.patcher, name)
    save(loaded.patcher, f"passthrough-{form.split(',')[0]}-{how}", how, True)
    saved = max(output.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    again = load(saved, compute="dequantize").patcher
    first, second = weights(loaded.patcher.model.diffusion_model), weights(again.model.diffusion_model)
    assert all(torch.equal(first[key], second[key]) for key in first) and common.rel_l2(forward(again, name), before) < 1e-5


@pytest.mark.parametrize("form", ["BF16", "FP8"])
@pytest.mark.parametrize("name", host_models.BESIDE)
def test_what_is_around_the_network(name, form, tmp_path, output):
    """It lies beside the transformer in a whole checkpoint, and is in what this pack saves."""
    from quantized_transformers.makers.save import save

    stored, truth = stored_as(name, host_models.make(name), form)
    beside, prefix = host_models.BESIDE[name], "model.model." if name.startswith("Stable Audio") else WHOLE
    whole = {key if key in beside else prefix + key: tensor for key, tensor in stored.items()}
    common.save(tmp_path, whole | {"pretransform.model.decoder.bias": torch.ones(4)}, None, None, "model.safetensors")
    with host_models.detected(name):
        loaded, expected = load(tmp_path / "model.safetensors"), stock(truth, name)
        assert "pretransform.model.decoder.bias" in loaded.report
        saved, _ = save(loaded.patcher, f"around-{form}", overwrite=True)
        for made in (loaded, load(saved)):
            same_model(made.patcher.model, expected)


def test_a_model_that_its_file_would_not_tell(tmp_path, output):
    """Names and sizes are all that ComfyUI knows a file by: what else a MODEL has is said, another one is refused."""
    from quantized_transformers.makers.save import save

    loaded = load(file_of("SD3.5 M", "FP8", tmp_path)[0]).patcher
    loaded.model.model_config.unet_config["set_by_somebody"] = 1
    assert "the file does not tell set_by_somebody" in save(loaded, "told", overwrite=True)[1]
    loaded.model.model_config.unet_config["depth"] = 7
    with pytest.raises(CheckpointError, match="would take a file of this SD3 for a SD3 of other depth"):
        save(loaded, "another", overwrite=True)
    assert not list(output.rglob("another*"))


@pytest.mark.parametrize("name", [name for name in host_models.MODELS if host_models.metadata_of(name)])
def test_what_only_a_header_says_is_saved(name, tmp_path, output):
    """Also of a MODEL that ComfyUI's own loader made."""
    from quantized_transformers.makers.save import save

    tensors = host_models.make(name)
    loaded = load(header_file(name, tmp_path))
    for patcher in (loaded.patcher, stock_patcher(tensors, host_models.metadata_of(name))):
        save(patcher, "header", "exact", True)
        again = load(max(output.rglob("header*.safetensors"), key=lambda path: path.stat().st_mtime_ns))
        assert model_identity(again.patcher.model) == model_identity(loaded.patcher.model)


def test_what_only_a_header_tells_apart(tmp_path):
    """Wan's relatives of its very names and sizes: none overrides another, of either loader's."""
    names = ["Wan 2.1 T2V", *host_sizes.HEADERS]
    paths = {name: header_file(name, tmp_path / str(i)) for i, name in enumerate(names)}
    for name in names:
        for base in (load(paths[name]).patcher, stock_patcher(host_models.make(name), host_models.metadata_of(name))):
            for other in names:
                if other == name:
                    assert model_identity(model.override(base, model.Request(str(paths[other]))).patcher.model) == model_identity(base.model)
                else:
                    with pytest.raises(CheckpointError, match="the override is"):
                        model.override(base, model.Request(str(paths[other])))


@pytest.mark.parametrize("config", ["{}", "[1]", "no JSON", '{"transformer": {"nonsense": 1}}', '{"_class_name": "Wan"}'])
def test_a_header_of_someone_elses(config, tmp_path):
    """It says nothing to the host: the names count."""
    stored, _ = stored_as("Wan 2.1 T2V", host_models.make("Wan 2.1 T2V"), "FP8")
    common.save(tmp_path, stored, None, {"config": config}, "model.safetensors")
    assert load(tmp_path / "model.safetensors").description.architecture == "Wan"


def test_compared_weight_by_weight(tmp_path):
    from quantized_transformers.makers.compare.weights import compare_weights

    name = "SD3.5 M"
    paths = [file_of(name, form, tmp_path / str(i))[0] for i, form in enumerate(("BF16", "FP8"))]
    found = compare_weights(*[locate(str(path)) for path in paths])
    assert len(found.worst_first) > 20 and 0.01 < found.total.relative < 0.05


@pytest.mark.parametrize(("marks", "prediction"), [
    ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "V_PREDICTION"),
    ({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, "EDM"),
    ({"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.01)}, "V_PREDICTION_EDM")])
def test_marks_of_another_prediction(marks, prediction, tmp_path, output):
    """Beside an SDXL UNet, and in a whole checkpoint: they go to the host, which samples otherwise, and are in what is
    saved. One that the host does not look at is refused."""
    from quantized_transformers.makers.save import save

    path, truth = file_of("SDXL", "FP8", tmp_path / "xl", beside=marks)
    assert agrees(path, truth | marks, "SDXL").model_type.name == prediction
    company = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4)}
    path, _ = file_of("SDXL", "FP8", tmp_path / "whole", WHOLE, marks | company)
    agrees(path, truth | marks, "SDXL")
    with host_models.detected("SDXL"):
        saved, _ = save(load(path).patcher, f"prediction-{prediction}", overwrite=True)
    agrees(saved, truth | marks, "SDXL")
    path, _ = file_of("SD 1.5", "FP8", tmp_path / "sd", beside=marks)
    with host_models.detected("SD 1.5"), pytest.raises(CheckpointError, match="unexpected tensors"):
        load(path)


@pytest.mark.parametrize(("scale", "prediction"), [(0.01, "EPS"), (1.0, "V_PREDICTION")])
def test_a_prediction_that_values_tell(scale, prediction, tmp_path, output):
    """Whether SD 2 predicts velocity the host guesses from a bias: no header tells it, the loaded MODEL does, in the
    report, behind a base, and saved."""
    from quantized_transformers.makers.save import save

    name, key = "SD 2", "output_blocks.11.1.transformer_blocks.0.norm1.bias"

    def write(folder, factor):
        bias = (torch.linspace(-1, 1, 64) * factor).to(torch.bfloat16).float()
        stored, truth = stored_as(name, host_models.make(name) | {key: bias}, "FP8")
        return common.save(tmp_path / folder, stored, None, None, "model.safetensors") / "model.safetensors", truth

    (path, truth), (other, _) = write("this", scale), write("other", 1.01 - scale)
    assert agrees(path, truth, name).model_type.name == prediction
    with host_models.detected(name):
        assert "prediction" not in describe(Checkpoint(locate(str(path)))).dims
        loaded = load(path)
        assert f"prediction {prediction}" in loaded.report
        request = model.Request(str(path))
        assert model.override(loaded.patcher, request).patcher.model.model_type.name == prediction
        with pytest.raises(CheckpointError, match="another SD20 than the base: prediction"):
            model.override(load(other).patcher, request)
        save(loaded.patcher, f"prediction-{prediction}", "exact", True)
        saved = max(output.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    assert agrees(saved, truth, name).model_type.name == prediction


def test_a_class_of_a_newer_host(tmp_path, monkeypatch):
    import comfy.supported_models

    class Tomorrow(comfy.supported_models.LTXV):
        pass

    path, truth = file_of("LTX-Video", "FP8", tmp_path)
    assert "this ComfyUI only" not in load(path).report
    monkeypatch.setattr(comfy.supported_models, "models", [Tomorrow, *comfy.supported_models.models])
    loaded = load(path)
    assert loaded.description.architecture == "Tomorrow" and "Tomorrow is known to this ComfyUI only" in loaded.report
    same_model(loaded.patcher.model, stock(truth, "LTX-Video"))

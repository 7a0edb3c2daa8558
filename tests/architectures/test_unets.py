"""UNets of Stable Diffusion in diffusers' folders: what the scheduler beside one says of it."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.classes import unet
from quantized_transformers.loaders.architectures.derived import Translated
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from support import common, downloads, host_models
from support.derived.unet import PUBLISHED, SMALL, XL
from support.hub import COMMIT, FakeRepo, Hub
from support.passthrough import load

pytestmark = pytest.mark.parity


def write(folder, config, scheduler=None):
    """A pipeline's folder with a tiny UNet."""
    torch.manual_seed(0)
    common.randomise(diffusers.UNet2DConditionModel(**config)).save_pretrained(folder / "unet")
    file = folder / "unet" / "config.json"
    # the sizes of the published ones, by which the host knows them, are not those of a tiny one
    kept = {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key in ("_class_name", "act_fn")}
    width = {128: 2048, 96: 768}[config["cross_attention_dim"]]
    file.write_text(json.dumps(kept | {"cross_attention_dim": width}), encoding="utf-8")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
                                             encoding="utf-8")
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return folder


@pytest.mark.parametrize("scheduler, prediction, zero", [
    (None, "EPS", False), ({"prediction_type": "epsilon"}, "EPS", False), ({"prediction_type": "v_prediction"}, "V_PREDICTION", False),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "V_PREDICTION", True)])
def test_what_an_sdxl_predicts(scheduler, prediction, zero, tmp_path):
    write(tmp_path, XL, scheduler)
    for path in (tmp_path, tmp_path / "unet"):
        with host_models.detected("SDXL"):
            loaded = load(path)
        assert loaded.patcher.model.model_type.name == prediction and loaded.description.dims["prediction"] == prediction
        assert loaded.patcher.model.model_sampling.zsnr is zero
        assert ("no scheduler lies beside" in loaded.report) == (scheduler is None)


def test_what_comfyui_would_sample_otherwise_is_refused(tmp_path):
    write(tmp_path, SMALL, {"prediction_type": "v_prediction"})
    with host_models.detected("SD 1.5"), pytest.raises(CheckpointError, match="predicts V_PREDICTION, and ComfyUI takes it for EPS"):
        load(tmp_path)


def test_an_override_is_told_by_the_bases_scheduler(tmp_path):
    write(tmp_path / "base", XL, {"prediction_type": "v_prediction"})
    write(tmp_path / "override", XL)
    with host_models.detected("SDXL"):
        base = load(tmp_path / "base")
        alone = load(tmp_path / "override" / "unet")
        assert alone.patcher.model.model_type.name == "EPS"
        found = model.override(base.patcher, model.Request(str(tmp_path / "override" / "unet")))
    assert found.patcher.model.model_type.name == "V_PREDICTION"


def test_a_download_brings_the_scheduler(tmp_path):
    write(tmp_path / "repo", XL, {"prediction_type": "v_prediction"})
    with Hub({"owner/xl": FakeRepo.of(tmp_path / "repo")}) as hub:
        _, text = downloads.run(hub, tmp_path, "owner/xl", "--download")
    snapshot = tmp_path / "hub" / "models--owner--xl" / "snapshots" / COMMIT
    assert sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{downloads.WEIGHTS}"], text
    assert locate(str(snapshot)).companions[0].config.endswith("scheduler_config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_published_sizes_nothing_is_missing_or_left(name, tmp_path):
    """By the host's own detection, without memory."""
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(**PUBLISHED[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    unet.CLASS.check(PUBLISHED[name])
    made = Translated(unet.CLASS, shapes, {}, PUBLISHED[name])
    assert made.network.name == name.partition(",")[0]
    assert {key for key, target in made.network.becomes.items() if target in made.network.parameters} == made.native.keys()
    assert set(made.network.becomes.values()) >= made.network.parameters.keys() and len(made.native) == len(shapes)

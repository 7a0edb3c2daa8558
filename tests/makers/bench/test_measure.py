"""Timed steps of every architecture: inputs that the real models take, one step in every number, memory that runs out."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures import ARCHITECTURES
from quantized_transformers.loaders.architectures.base import Inputs
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers.bench import measure
from support import svdquant_sdxl as sdxl
from support.families import FAMILIES

pytestmark = pytest.mark.host

VIDEOS = ("wan", "hunyuan_video")


@pytest.fixture(scope="module", autouse=True)
def as_the_server_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[*FAMILIES, "sdxl"])
def patcher(request, tmp_path_factory):
    """A tiny model of each architecture, from its file."""
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        if request.param == "sdxl":
            stack.enter_context(sdxl.small_widths())
            folder = sdxl.make().write(folder)
        else:
            family = stack.enter_context(FAMILIES[request.param].ready()) or FAMILIES[request.param]
            with torch.inference_mode(False):
                family.support.make().save_pretrained(folder)
        yield model.load(model.Request(str(folder)), quiet=True).patcher


def test_a_model_takes_what_is_made_for_it(patcher, request):
    """Through the host's own sampler; one channel of the prompt less, and the model refuses it."""
    frames = 5 if any(name in request.node.name for name in VIDEOS) else 1
    latent = measure.random_latent(patcher, 64, 96, frames)
    said = measure.random_conditioning(patcher)
    found = measure.measure(patcher, latent, said, warm=1, steps=2)
    assert len(found.steps) == len(found.launch) == 2
    assert all(0 < launch <= step for launch, step in zip(found.launch, found.steps, strict=True))
    assert found.held == found.peak == 0  # a CPU counts neither
    with pytest.raises(RuntimeError):
        measure.measure(patcher, latent, [[said[0][0][..., :-1], said[0][1]]], warm=0, steps=1)
    pooled = said[0][1].get("pooled_output")
    if pooled is not None:
        with pytest.raises(RuntimeError):
            measure.measure(patcher, latent, [[said[0][0], {"pooled_output": pooled[..., :-1]}]], warm=0, steps=1)


def test_every_architecture_is_among_them(patcher):
    """The one that the model is of is found; a new one in the registry needs a tiny model here."""
    assert len(ARCHITECTURES) == len(FAMILIES) + 1
    assert isinstance(measure.inputs_of(patcher), Inputs)


@pytest.mark.parametrize("name, shape, tokens", [
    # what the papers and model cards say of the published sizes
    ("FLUX.1", (1, 16, 128, 128), 4096), ("FLUX.2", (1, 128, 64, 64), 4096), ("Qwen-Image", (1, 16, 1, 128, 128), 4096),
    ("Z-Image", (1, 16, 128, 128), 4096), ("Wan", (1, 16, 21, 60, 104), 32760),
    ("HunyuanVideo", (1, 16, 33, 90, 160), 118800), ("SDXL", (1, 4, 128, 128), 0)])
def test_tokens(name, shape, tokens):
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    takes = architecture.inputs({"text": 64, "pooled": 32, "vector": 2816})
    assert measure.tokens_of(takes, {"samples": torch.zeros(shape, device="meta")}) == tokens


def test_texts_are_as_long_as_the_hosts_own():
    import comfy.sdxl_clip
    import comfy.text_encoders.flux

    sizes = {"text": 64, "pooled": 32, "vector": 2816}
    takes = {one.name: one.inputs(sizes) for one in ARCHITECTURES if one.name in ("FLUX.1", "SDXL")}
    tokens = comfy.text_encoders.flux.FluxTokenizer().tokenize_with_weights("a cat")["t5xxl"]
    assert [len(chunk) for chunk in tokens] == [takes["FLUX.1"].text[0]]
    tokens = comfy.sdxl_clip.SDXLTokenizer().tokenize_with_weights("a cat")["g"]
    assert [len(chunk) for chunk in tokens] == [takes["SDXL"].text[0]]
    assert takes["SDXL"].pooled == 1280  # of CLIP-G


def test_one_step_is_profiled(tiny, tmp_path, monkeypatch):
    """As many dequantized weights as the checkpoint has FP8 layers: not a step more, and none missing. Counted where they
    are dequantized whole, as on a GPU."""
    from quantized_transformers.quant.kernels import by_tiles

    monkeypatch.setattr(by_tiles, "takes", lambda x: False)
    loaded = model.load(model.Request(str(tiny.fp8)), quiet=True)
    trace = tmp_path / "trace.json"
    found = measure.profile(loaded.patcher, measure.random_latent(loaded.patcher, 64, 64),
                            measure.random_conditioning(loaded.patcher), path=str(trace))
    calls = {name: count for name, _, count in found}
    assert calls["comfy_kitchen::dequantize_fp8"] == loaded.description.formats["FP8"] == 47
    seconds = [spent for _, spent, _ in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    names = [event["name"] for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]]
    assert names.count("comfy_kitchen::dequantize_fp8") == 47


def test_the_first_step_has_what_is_done_once(tiny):
    """Without warm steps the first is counted from the call."""
    patcher = model.load(model.Request(str(tiny.fp8)), quiet=True).patcher
    latent, said = measure.random_latent(patcher, 64, 64), measure.random_conditioning(patcher)
    done = []

    def slow(apply, options):
        if not done:
            time.sleep(1.5)
        done.append(1)
        return apply(options["input"], options["timestep"], **options["c"])

    patcher.set_model_unet_function_wrapper(slow)
    assert measure.measure(patcher, latent, said, warm=0, steps=2).steps[0] >= 1.5
    done.clear()
    assert max(measure.measure(patcher, latent, said, warm=1, steps=2).steps) < 1.5 and len(done) == 3


def test_what_cannot_be_measured_is_refused(tiny):
    patcher = model.load(model.Request(str(tiny.fp8)), quiet=True).patcher
    with pytest.raises(CheckpointError, match="makes pictures, not videos"):
        measure.random_latent(patcher, 64, 64, 5)
    latent, said = measure.random_latent(patcher, 64, 64), measure.random_conditioning(patcher)
    with pytest.raises(CheckpointError, match="the trace cannot be written"):
        measure.profile(patcher, latent, said, path="/nowhere/trace.json")

    def full(apply, options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patcher.set_model_unet_function_wrapper(full)
    with pytest.raises(CheckpointError, match="the device's memory ran out"):
        measure.measure(patcher, latent, said)


def test_a_model_of_another_architecture_is_refused():
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({"adm_in_channels": None, "in_channels": 4, "model_channels": 32})
    config.unet_config["disable_unet_model_creation"] = True
    other = comfy.model_patcher.ModelPatcher(comfy.model_base.BaseModel(config), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="what it takes is not known here"):
        measure.random_conditioning(other)

"""Several GPUs in one ComfyUI: its own *MultiGPU CFG Split* and *Select Model Device* with our MODELs. The second device is the CPU by
another name, so what is proven is that both halves are the same model, not that it is faster."""

from __future__ import annotations

import gc

import comfy.model_management as management
import pytest
import torch
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode, SelectModelDeviceNode

from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.bench.measure import random_conditioning, random_latent
from quantized_transformers.nodes.load_lora import QT_KeepDecoded
from support import flux, lora, modelslim, svdquant_models

pytestmark = pytest.mark.parity

SECOND = torch.device("cpu", 1)
FORWARD = 1e-5  # F32 sums in another order: two evaluations at once, or one on each device
FORMATS = ("fp8", "nvfp4", "svdq int4", "online mxfp8", "modelslim w8a8")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [torch.device("cpu"), SECOND])
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def load(tiny, tmp_path_factory):
    """Format -> a MODEL of it, loaded anew."""
    made = tmp_path_factory.mktemp("formats")
    svdq = svdquant_models.make_flux().write(made / "svdq")
    wan = modelslim.folder("w8a8", made / "modelslim")

    def load(name):
        if name == "online mxfp8":
            return online_mxfp8.quantize(load("bf16"))[0]
        folder = {"bf16": tiny.bf16, "fp8": tiny.fp8, "nvfp4": tiny.nvfp4_mixed, "svdq int4": svdq, "modelslim w8a8": wan}[name]
        return model.load(model.Request(str(folder)), quiet=True).patcher
    return load


def sampled(patcher):
    """Three steps at CFG 4: two evaluations a step."""
    start = host.start_of(patcher, random_latent(patcher, 64, 64), 3)
    return host.sample(patcher, start, lambda step, x0: None, steps=3, cfg=4.0, sampler_name="euler", scheduler="simple", seed=3,
                       positive=random_conditioning(patcher, 0), negative=random_conditioning(patcher, 1), quiet=True)


def split(patcher):
    """Without what earlier tests have let go of in the host's list, where its node takes every entry for a model."""
    gc.collect()
    management.current_loaded_models[:] = [one for one in management.current_loaded_models if one.model is not None]
    return MultiGPUCFGSplitNode.execute(patcher, 2).args[0]


def clone_of(patcher):
    """The MODEL on the second device, and how often it was evaluated."""
    second, = patcher.get_additional_models_with_key("multigpu")
    calls: list[int] = []
    second.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    return second, calls


@pytest.mark.parametrize("name", FORMATS)
def test_both_halves_are_one_model(name, load):
    patcher = load(name)
    alone, both = sampled(patcher), split(load(name))
    second, calls = clone_of(both)
    assert second.load_device == SECOND and second.model is not both.model
    assert flux.rel_l2(sampled(both), alone) < FORWARD
    assert len(calls) == 3, "one half of each step"
    assert {p.device for p in second.model.diffusion_model.parameters()} <= {SECOND, torch.device("cpu")}


TARGETS = {"transformer_blocks.0.attn.to_q": (256, 256), "single_transformer_blocks.1.attn.to_v": (256, 256),
           "transformer_blocks.1.ff.net.2": (256, 1024)}


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "svdq int4"])
def test_a_lora_before_and_behind_it(name, load, tmp_path):
    tensors = lora.random_lora(TARGETS)
    alone = sampled(lora.load_lora(load(name), tensors, tmp_path))
    assert flux.rel_l2(alone, sampled(load(name))) > 1e-3
    before = split(lora.load_lora(load(name), tensors, tmp_path))
    behind = lora.load_lora(split(load(name)), tensors, tmp_path)
    for both in (before, behind):
        _, calls = clone_of(both)
        assert flux.rel_l2(sampled(both), alone) < FORWARD and len(calls) == 3


def test_decoded_weights_are_kept_beside_it(load):
    """Of the MODEL that the node is on; the other device decodes as ever."""
    patcher = load("fp8")
    alone = sampled(patcher)
    both = split(QT_KeepDecoded.execute(load("fp8"), 0.0).args[0])
    assert flux.rel_l2(sampled(both), alone) < FORWARD


def test_a_model_is_taken_to_another_device(load, monkeypatch):
    """And back to the one that its loader gave it."""
    monkeypatch.setattr(management, "resolve_gpu_device_option", lambda option: SECOND if option == "gpu:1" else None)
    patcher = load("fp8")
    alone = sampled(patcher)
    moved = SelectModelDeviceNode.execute(patcher, "gpu:1").args[0]
    assert moved.load_device == SECOND
    assert flux.rel_l2(sampled(moved), alone) < FORWARD
    back = SelectModelDeviceNode.execute(moved, "default").args[0]
    assert back.load_device == torch.device("cpu") and flux.rel_l2(sampled(back), alone) < FORWARD


def test_the_doctor_says_how_many(monkeypatch):
    from quantized_transformers.views import doctor

    assert "several GPUs" in doctor.facts() and doctor.facts()["several GPUs"].startswith("2: ")
    monkeypatch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [torch.device("cpu")])
    assert "several GPUs" not in doctor.facts()

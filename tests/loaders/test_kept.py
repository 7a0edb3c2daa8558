"""Keep Weights Decoded on whole models, through the host's own sampler: the same numbers, no decoding from the third step
on, memory that is kept to, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import comfy.model_management as management
import pytest
import torch

from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.makers.bench.measure import random_conditioning, random_latent
from quantized_transformers.nodes.load_lora import QT_KeepDecoded
from quantized_transformers.quant.codecs import codecs
from support import common, lora, svdquant_models

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # F32 sums of the same network in another order (tests/architectures/test_flux1.py)
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def as_the_server_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    with torch.inference_mode(False):
        svdq = svdquant_models.make_flux().write(tmp_path_factory.mktemp("svdq"))
    return {"fp8": tiny.fp8, "nvfp4": tiny.nvfp4_mixed, "svdq int4": svdq}


@pytest.fixture(scope="module")
def fp8(folders):
    return load(folders["fp8"])


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True).patcher


def keeping(patcher, most: float = 0.0):
    return QT_KeepDecoded.execute(patcher, most).args[0]


def sampled(patcher, on_step=lambda step: None, steps: int = STEPS):
    """The result; `on_step` is called with the number of every step, from 1, after it."""
    said = random_conditioning(patcher)
    start = host.start_of(patcher, random_latent(patcher, 64, 96), 3)
    return host.sample(patcher, start, lambda step, x0: on_step(step + 1), steps=steps, cfg=1.0, sampler_name="euler",
                       scheduler="simple", positive=said, negative=said, seed=3, quiet=True)


def layers(patcher) -> dict:
    return {name: one for name, one in patcher.model.diffusion_model.named_modules() if hasattr(one, "kept")}


def kept(patcher) -> dict[str, int]:
    """Layer -> bytes that are kept of it now."""
    return {name: one.kept.bytes for name, one in layers(patcher).items() if one.kept is not None and one.kept.bytes}


def clean(patcher) -> bool:
    return all(one.kept is None for one in layers(patcher).values())


@pytest.fixture
def decoded(monkeypatch):
    """Counts what codecs decode."""
    found = SimpleNamespace(count=0)

    def counted(real):
        def call(*args, **kwargs):
            found.count += 1
            return real(*args, **kwargs)
        return call

    for name, kind in codecs().items():
        for method in ("decode_rows", "residual", "dequantize") if name != "plain" else ():
            monkeypatch.setattr(kind, method, counted(getattr(kind, method)))
    return found


@pytest.fixture
def memory(fp8, monkeypatch):
    """What the host says is free before anything is kept of a model, less the quarter that stays free: `spare`."""
    found = SimpleNamespace(spare=1 << 40, model=fp8)
    quarter = management.get_total_memory(torch.device("cpu")) // 4

    def free(device=None, torch_free_too=False):
        left = quarter + found.spare - sum(kept(found.model).values())
        return (left, left) if torch_free_too else left

    monkeypatch.setattr(management, "get_free_memory", free)
    return found


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "svdq int4"])
def test_the_same_numbers_without_decoding(name, folders, decoded, memory, caplog):
    patcher = load(folders[name])
    counts: dict[str, list[int]] = {"plain": [0], "kept": [0]}
    wanted = sampled(patcher, lambda step: counts["plain"].append(decoded.count))
    decoded.count = 0
    with caplog.at_level(logging.INFO):
        out = sampled(keeping(patcher), lambda step: counts["kept"].append(decoded.count))
    every = {key: [b - a for a, b in zip(found, found[1:], strict=False)] for key, found in counts.items()}
    assert min(every["plain"]) == every["plain"][2] > 0 and every["kept"][0] >= every["plain"][2]
    assert every["kept"][1] > 0 and every["kept"][2:] == [0] * (STEPS - 2)  # once, before the second step
    assert common.rel_l2(out, wanted) < FORWARD and clean(patcher)
    total = len([one for one in layers(patcher).values() if hasattr(one.weight, "_qdata")])
    assert total > 3 and f"kept {total} of {total} layers decoded" in caplog.text


def test_in_16_bit(folders, memory):
    """dtype: bf16 makes the host dequantize by its own way."""
    patcher, seen = load(folders["fp8"], dtype="bf16"), []
    wanted = sampled(patcher)
    out = sampled(keeping(patcher), lambda step: seen.append(kept(patcher)))
    total = len([one for one in layers(patcher).values() if hasattr(one.weight, "_qdata")])
    assert [len(one) for one in seen] == [0] + [total] * (STEPS - 1)
    assert common.rel_l2(out, wanted) < 2.0 ** -7  # the same products, where torch makes the same of them: mostly zero


def test_no_more_than_was_allowed_the_largest_first(fp8, memory):
    sizes = {name: one.weight.numel() * 4 for name, one in layers(fp8).items() if hasattr(one.weight, "_qdata")}
    most, seen = 5_000_000, []
    wanted = sampled(fp8)
    out = sampled(keeping(fp8, most / 1e9), lambda step: seen.append(kept(fp8)))
    assert not seen[0] and seen[1] == seen[-1] and seen[1] == {name: sizes[name] for name in seen[1]}
    left = most - sum(seen[1].values())
    assert 0 <= left < min(sizes.values()) and max(sizes.values()) in seen[1].values()
    assert min(seen[1].values()) <= left + max(size for name, size in sizes.items() if name not in seen[1])
    assert common.rel_l2(out, wanted) < FORWARD
    memory.spare = 3_000_000  # what is free says so, too
    sampled(keeping(fp8), lambda step: seen.append(kept(fp8)))
    assert 0 < sum(seen[-1].values()) <= 3_000_000


def test_it_makes_room_where_memory_becomes_short(fp8, memory):
    seen = []

    def on_step(step):
        seen.append(kept(fp8))
        memory.spare = {2: sum(seen[-1].values()) - 4_000_000, 3: 1 << 40}.get(step, memory.spare)

    wanted = sampled(fp8)
    out = sampled(keeping(fp8), on_step)
    before, after = (sum(one.values()) for one in (seen[1], seen[2]))
    assert before - 4_000_000 - max(seen[1].values()) <= after <= before - 4_000_000
    assert max(seen[2].values()) == max(seen[1].values())  # the smallest go first
    assert seen[3] == seen[2]  # and do not come and go
    assert common.rel_l2(out, wanted) < FORWARD


def test_where_memory_runs_out_the_step_is_made_again(fp8, memory, monkeypatch, caplog):
    layer, calls, seen = layers(fp8)["single_blocks.1.linear1"], [], []
    forward = layer.forward

    def short(*args, **kwargs):
        calls.append(bool(layer.kept is not None and layer.kept.bytes))
        if calls.count(True) == 2 and calls[-1]:
            raise torch.OutOfMemoryError("simulated")
        return forward(*args, **kwargs)

    wanted = sampled(fp8)
    monkeypatch.setattr(layer, "forward", short)
    out = sampled(keeping(fp8), lambda step: seen.append(len(kept(fp8))))
    assert calls == [False, True, True, False, False, False] and seen[1] > 0 == seen[2] == seen[-1]
    assert common.rel_l2(out, wanted) < FORWARD and clean(fp8) and "memory ran out" in caplog.text
    monkeypatch.setattr(layer, "forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError):  # nothing that could be given back
        sampled(keeping(fp8))


@pytest.mark.parametrize("how", ["end", "error", "cancel"])
def test_nothing_is_left_after_a_run(how, fp8, memory):
    held = []

    def on_step(step):
        if step == 3:
            held.extend(weakref.ref(one.kept.weight._qdata) for one in layers(fp8).values() if one.kept and one.kept.bytes)
            if how == "error":
                raise ValueError("in the middle")
            if how == "cancel":
                management.interrupt_current_processing()

    patcher = keeping(fp8)
    if how == "end":
        sampled(patcher, on_step)
    else:
        with pytest.raises(ValueError if how == "error" else management.InterruptProcessingException):
            sampled(patcher, on_step)
    gc.collect()
    assert len(held) == 33 and not any(one() is not None for one in held) and clean(fp8)
    again = []
    sampled(patcher, lambda step: again.append(len(kept(fp8))))  # and it works again
    assert again == [0, 33, 33, 33, 33]


def test_other_models_of_the_same_weights_keep_nothing(fp8, memory):
    patcher, seen = keeping(fp8), []
    sampled(patcher)
    sampled(fp8, lambda step: seen.append(len(kept(fp8))))
    sampled(fp8.clone(), lambda step: seen.append(len(kept(fp8))))
    assert not any(seen)
    sampled(patcher.clone(), lambda step: seen.append(len(kept(fp8))))  # a clone behind the node does
    assert seen[-1] == 33
    sampled(keeping(patcher, 1e-6), lambda step: seen.append(len(kept(fp8))))  # the last node's word counts
    assert seen[-1] == 0


@pytest.mark.parametrize("before", [True, False])
def test_loras_before_and_behind(before, fp8, memory, tmp_path):
    names = {"transformer_blocks.0.attn.to_q": (256, 256), "single_transformer_blocks.1.proj_mlp": (1024, 256)}
    tensors, seen = lora.random_lora(names), []
    wanted = sampled(lora.load_lora(fp8, tensors, tmp_path))
    assert common.rel_l2(sampled(fp8), wanted) > 1e-2
    patcher = keeping(lora.load_lora(fp8, tensors, tmp_path)) if before else lora.load_lora(keeping(fp8), tensors, tmp_path)
    out = sampled(patcher, lambda step: seen.append(len(kept(fp8))))
    assert common.rel_l2(out, wanted) < FORWARD and seen[-1] == 33
    assert common.rel_l2(sampled(fp8), wanted) > 1e-2 and clean(fp8)


def test_nothing_of_it_is_saved_or_copied(fp8, memory):
    seen = []

    def on_step(step):
        if step == 3:
            network = fp8.model.diffusion_model
            twin = copy.deepcopy(network)
            seen.append((set(network.state_dict()), {name for name, _ in network.named_parameters()},
                         {name for name, _ in network.named_buffers()}, len(kept(fp8))))
            assert all(one.kept is None for one in twin.modules() if hasattr(one, "kept"))
            assert set(twin.state_dict()) == set(network.state_dict())
            assert host.unpatched_tensors(fp8).keys() == network.state_dict().keys()

    network = fp8.model.diffusion_model
    names = set(network.state_dict()), {name for name, _ in network.named_parameters()}, {name for name, _ in network.named_buffers()}
    sampled(keeping(fp8), on_step)
    assert seen == [(*names, 33)]


def test_layers_that_the_host_streams_are_not_kept(fp8, memory, caplog):
    streamed, seen = layers(fp8)["double_blocks.0.img_attn.qkv"], []
    streamed._v = object()  # what dynamic VRAM marks them by
    try:
        with caplog.at_level(logging.INFO):
            sampled(keeping(fp8), lambda step: seen.append(kept(fp8)))
    finally:
        del streamed._v
    assert len(seen[-1]) == 32 and "double_blocks.0.img_attn.qkv" not in seen[-1]
    assert "kept 32 of 33 layers decoded" in caplog.text and "1 are streamed" in caplog.text


def test_a_model_that_goes_takes_it_along(fp8, memory):
    """The host lets go of a model in the middle of a run: what it had is not used any more, nor held."""
    seen = []

    def on_step(step):
        seen.append(len(kept(fp8)))
        if step == 3:
            fp8.model.to(torch.device("cpu"))
            seen.append(len(kept(fp8)))

    wanted = sampled(fp8)
    assert common.rel_l2(sampled(keeping(fp8), on_step), wanted) < FORWARD
    assert seen == [0, 33, 33, 0, 0, 0] and clean(fp8)


def test_the_report(fp8, tiny, memory, monkeypatch):
    memory.spare = 3_000_000_000
    _, report = QT_KeepDecoded.execute(fp8).args
    assert report == ("33 of 33 quantized layers are decoded for every product; kept decoded they take 26.12 MB\n"
                      "free on cpu beside what is kept for everything else: 3.00 GB now; it is asked again before every step")
    _, report = QT_KeepDecoded.execute(fp8, 1.5).args
    assert report.endswith("\nat most 1.50 GB of it, as chosen")
    _, report = QT_KeepDecoded.execute(load(tiny.bf16)).args
    assert report.startswith("0 of 0 quantized layers")
    monkeypatch.setattr(type(fp8), "is_dynamic", lambda self: True)
    assert "--disable-dynamic-vram" in QT_KeepDecoded.execute(fp8).args[1]


def test_what_a_gpu_keeps_free(monkeypatch):
    """The host's own rule for what a step needs: its minimum, or what the step took and what is for other programs."""
    gpu, gb = SimpleNamespace(type="cuda"), 1 << 30
    monkeypatch.setattr(management, "get_free_memory", lambda device: 10 * gb)
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", gb)
    assert host.spare_memory(gpu, 0) == int(10 * gb - 1.8 * gb)
    assert host.spare_memory(gpu, 4 * gb) == 5 * gb
    assert host.spare_memory(gpu, 12 * gb) == -3 * gb

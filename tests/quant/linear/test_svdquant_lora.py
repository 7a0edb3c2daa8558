"""LoRAs on SVDQuant weights by the host's own patching, against the dense definition W + strength * alpha / rank * B A.

The host's ModelPatcher loads, offloads and saves here as it does for its own models; one loaded file serves all.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers.host.errors import CheckpointError
from quantized_transformers.quant.layouts.tiled import TilesLayout, tiles_of
from quantized_transformers.quant.patches import factors as lora
from quantized_transformers.quant.patches import loading
from support.svdquant import awq, rel, w4a4
from support.svdquant_net import (
    KEYS,
    SIZES,
    Net,
    add,
    dense,
    inputs,
    layers,
    linear,
    linear_of,
    lora_file,
    make,
    merged,
    run,
)

pytestmark = pytest.mark.unit


def full(patcher):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.patch_model(patcher.load_device)
    try:
        return run(patcher.model.diffusion_model, inputs(128))
    finally:
        patcher.unpatch_model(patcher.offload_device)


def low_vram(patcher):
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    try:
        return run(patcher.model.diffusion_model, inputs(128))
    finally:
        patcher.unpatch_model(patcher.offload_device)


def dynamic(patcher):
    """What a load under dynamic VRAM leaves: patches in weight_lowvram_function. (Its buffers need a GPU.)"""
    from comfy.model_patcher import LowVramPatch

    try:
        for name, module in patcher.model.diffusion_model.named_children():
            key = f"diffusion_model.{name}.weight"
            module._v = object()
            module.weight_lowvram_function = LowVramPatch(key, patcher.patches) if key in patcher.patches else None
        first = run(patcher.model.diffusion_model.linear1, inputs(128))
        assert torch.equal(run(patcher.model.diffusion_model.linear1, inputs(128)), first)  # from the kept factors
        net = patcher.model.diffusion_model
        plain = net.plain.weight_lowvram_function
        if plain is not None:  # the host's own layers are not what this is about
            del net.plain._v
            net.plain.weight_function = [plain]
        return run(net, inputs(128))
    finally:
        for module in patcher.model.diffusion_model.children():
            vars(module).pop("_v", None)
            module.weight_lowvram_function, module.weight_function = None, []


MODES = [full, low_vram, dynamic]
ALL = ("to_k", "to_v", "linear1", "linear2.mlp", "mod", "plain")


def effect_of(changes):
    x = inputs(128)
    return dense(changes)(x) - dense()(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", [("qkv",), ("to_k", "to_v"), ("linear1",), ("linear1.q", "linear1.mlp"), ("linear2",),
                                   ("linear2.mlp",), ("mod",), ALL], ids=str)
def test_effect_is_that_on_the_dense_weights(mode, names):
    base, file = make(), lora_file(*names)
    before = mode(base)
    assert rel(before, dense()(inputs(128))) < 1e-5
    effect = effect_of(merged(file))
    assert effect.norm() > 0.05 * before.norm()
    patched = add(base, file)
    assert rel(mode(patched) - before, effect) < 1e-4
    assert torch.equal(mode(base), before)  # taken off again
    assert rel(mode(add(base, file, 0.3)) - before, effect_of(merged(file, 0.3))) < 1e-4  # another strength
    assert rel(mode(patched) - before, effect) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_stacked(mode):
    base, one, two = make(), lora_file(*ALL), lora_file("to_k", "qkv", "linear2", seed=12, rank=4, alpha=6.0)
    both = add(add(base, one, 0.7), two, -0.4)
    effect = effect_of([*merged(one, 0.7), *merged(two, -0.4)])
    assert rel(mode(both) - mode(base), effect) < 1e-4


@pytest.mark.parametrize("name", ["qkv", "linear1", "linear2", "mod"])
@pytest.mark.parametrize("mode", ["full", "low_vram"])
def test_each_layer_with_quantized_activations(name, mode):
    """Only the low-rank pair changes: x A B on raw x, whatever the activations are rounded to."""
    base, file = make("comfy_kitchen"), lora_file(name)
    patched, x = add(base, file), inputs(SIZES[name][1])
    before = run(getattr(base.model.diffusion_model, name), x)
    memory = 0 if mode == "full" else 1
    patched.patch_model(patched.load_device, lowvram_model_memory=memory)
    try:
        module = getattr(patched.model.diffusion_model, name)
        assert module.weight._params.delta is None and bool(module.weight_function) == (mode == "low_vram")
        change = run(module, x) - before
    finally:
        patched.unpatch_model(patched.offload_device)
    assert rel(change, x @ next(iter(merged(file)))[1].t()) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_bf16(mode):
    """Factors are rounded to the model's dtype, as the host rounds weights."""
    base, file = make(dtype=torch.bfloat16), lora_file("qkv", "linear1", "linear2", "mod")
    effect = mode(add(base, file)) - mode(base)
    assert rel(effect, effect_of(merged(file))) < 0.05


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["int4", "nvfp4", "awq"])
def test_every_kind_takes_factors(kind, packed):
    layer = awq(192, 256) if kind == "awq" else w4a4(192, 256, 40, kind)
    weight = linear(layer, backend="nunchaku" if packed else "dequantize").weight
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(64, 5, generator=g), torch.randn(5, 128, generator=g) / 16
    longer = lora.append(weight, [lora.Factor(up, down, 0.5, row=32, column=128)])
    change = torch.zeros(192, 256)
    change[32:96, 128:] = up @ down / 2
    limit = 1e-2 if packed and kind != "awq" else 1e-5  # nunchaku's kernels take 16 bit
    assert rel(longer.dequantize() - weight.dequantize(), change) < limit


def test_the_host_neither_computes_nor_keeps_a_dense_weight(monkeypatch):
    """In a full load the weight stays quantized, with a longer low-rank pair, and no 16-bit weight is ever made."""
    def never(*_):
        raise AssertionError("dequantized")

    base = make()
    patched = add(base, lora_file("qkv", "linear1"))
    ranks = [tiles_of(getattr(patched.model.diffusion_model, n).weight)[0]["up"].shape[1] for n in ("qkv", "linear1")]
    monkeypatch.setattr(TilesLayout, "dequantize", never)
    patched.patch_model(patched.load_device)
    longer = [tiles_of(getattr(patched.model.diffusion_model, n).weight)[0]["up"].shape[1] for n in ("qkv", "linear1")]
    assert longer == [rank + 8 for rank in ranks]
    assert patched.model.diffusion_model.qkv.weight._params.delta is None
    patched.unpatch_model(patched.offload_device)
    assert [tiles_of(getattr(base.model.diffusion_model, n).weight)[0]["up"].shape[1] for n in ("qkv", "linear1")] == ranks


def test_partly_loaded_unloaded_and_loaded_again():
    """Weights that the host restores get their patches beside them, not twice."""
    base, file = make(), lora_file(*ALL)
    before, expected = full(base), effect_of(merged(file))
    patched = add(base, file)
    net = patched.model.diffusion_model

    def check(*states):
        """Which of the modules (by size of their patches) have them beside the weight, and that the effect is there."""
        assert [bool(m.weight_function) for m in (net.linear1, net.linear2, net.qkv, net.mod)] == list(states)
        assert rel(run(net, inputs(128)) - before, expected) < 1e-4

    patched.patch_model(patched.load_device, lowvram_model_memory=820_000)
    try:
        check(True, False, True, False)
        patched.partially_load(patched.load_device, extra_memory=1 << 40)
        check(False, False, False, False)
        patched.partially_unload(patched.offload_device, memory_to_free=1)
        check(True, True, True, True)
        patched.partially_load(patched.load_device, extra_memory=1 << 40)
        check(False, False, False, False)
        patched.partially_load(patched.load_device, extra_memory=1 << 40)  # nothing to do
        check(False, False, False, False)
    finally:
        patched.unpatch_model(patched.offload_device)
    assert torch.equal(full(base), before)


def lokr(name):
    rows, columns = SIZES[name]
    g = torch.Generator().manual_seed(5)
    return {f"{name}.lokr_w1": torch.randn(2, 2, generator=g) / 2,
            f"{name}.lokr_w2": torch.randn(rows // 2, columns // 2, generator=g) * columns ** -0.5}


def dora(name):
    rows, columns = SIZES[name]
    scale = torch.rand(1, columns, generator=torch.Generator().manual_seed(6)) + 0.5
    return {**lora_file(name), f"{name}.dora_scale": scale}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["lokr", "dora", "diff", "strength_model"])
def test_other_patches_are_exact_too(kind, mode, caplog):
    """LoKr, DoRA, dense differences and scaled models: the host's own arithmetic on the effective weight, as a delta."""
    import comfy.lora

    name = "linear2"
    file = {"lokr": lokr, "dora": dora, "strength_model": lora_file,
            "diff": lambda n: {f"{n}.diff": torch.randn(SIZES[n]) / 20}}[kind](name)
    base = make()
    model_strength = 0.9 if kind == "strength_model" else 1.0
    patched = add(base, file, 0.8, model_strength)
    weight = torch.cat([layer.weight for layer in layers()[name]], 1)
    after = comfy.lora.calculate_weight(patched.patches[KEYS[name]], weight.clone(), KEYS[name])
    if kind == "lokr":
        by_hand = weight + 0.8 * torch.kron(file[f"{name}.lokr_w1"], file[f"{name}.lokr_w2"])
        assert rel(after, by_hand) < 1e-6
    effect = effect_of([(name, after - weight)])
    assert effect.norm() > 0.01 * dense()(inputs(128)).norm()
    before = mode(base)
    assert rel(mode(patched) - before, effect) < 1e-4
    assert torch.equal(mode(base), before)


def test_a_wrapper_sees_the_effective_weight():
    base = make()
    base.add_weight_wrapper("diffusion_model.linear2.weight", lambda weight: weight * 2)
    net = dense([("linear2", torch.cat([layer.weight for layer in layers()["linear2"]], 1))])
    assert rel(low_vram(base), net(inputs(128))) < 1e-5
    both = add(base, lora_file("linear2"))
    change = dict(merged(lora_file("linear2")))["linear2"]
    weight = torch.cat([layer.weight for layer in layers()["linear2"]], 1)
    assert rel(low_vram(both), dense([("linear2", weight + 2 * change)])(inputs(128))) < 1e-5


@pytest.mark.parametrize("mode", ["full", "low_vram", "dynamic"])
@pytest.mark.parametrize("backend", ["dequantize", "nunchaku"])
def test_a_save_contains_the_lora(mode, backend, tmp_path):
    """The host's save nodes: model_state_dict_for_saving, then safetensors; loaded again without the LoRA."""
    import comfy.utils
    from comfy.model_patcher import LowVramPatch

    base, file = make(backend), lora_file("qkv", "linear1", "linear2.mlp", "mod")
    effect = effect_of(merged(file))
    patched = add(base, file)
    if mode == "dynamic":
        for name, module in patched.model.diffusion_model.named_children():
            key = f"diffusion_model.{name}.weight"
            module.weight_lowvram_function = LowVramPatch(key, patched.patches) if key in patched.patches else None
    else:
        patched.patch_model(patched.load_device, lowvram_model_memory=mode == "low_vram")
    net = patched.model.diffusion_model
    path = str(tmp_path / "saved.safetensors")
    comfy.utils.save_torch_file(patched.model_state_dict_for_saving(net, "diffusion_model."), path)
    if mode != "dynamic":
        patched.unpatch_model(patched.offload_device)
    saved, modules = load_file(path), {}
    for name in layers():
        own = {f"x.{k.removeprefix(name + '.')}": v for k, v in saved.items() if k.startswith(f"{name}.")}
        modules[name] = linear_of(own, tuple(getattr(net, name).weight.shape), "dequantize")
    again = Net(**modules, plain=base.model.diffusion_model.plain)
    assert rel(run(again, inputs(128)) - dense()(inputs(128)), effect) < (1e-4 if backend == "dequantize" else 1e-2)


@pytest.mark.parametrize("name", ["qkv", "linear2"])
@pytest.mark.parametrize("memory", [0, 1], ids=["full", "low_vram"])
def test_other_deltas_are_saved_as_they_act(name, memory, tmp_path):
    """By the host's save nodes; linear2 has a stored bias that goes with the quantized weight alone."""
    import comfy.utils

    base = make()
    patched = add(base, dora(name))
    expected = full(patched)
    patched.patch_model(patched.load_device, lowvram_model_memory=memory)
    net, path = patched.model.diffusion_model, str(tmp_path / "saved.safetensors")
    comfy.utils.save_torch_file(patched.model_state_dict_for_saving(net, "diffusion_model."), path)
    patched.unpatch_model(patched.offload_device)
    saved = load_file(path)
    modules = {key: linear_of({f"x.{k.removeprefix(key + '.')}": v for k, v in saved.items() if k.startswith(f"{key}.")},
                              tuple(getattr(net, key).weight.shape), "dequantize") for key in layers()}
    assert rel(run(Net(**modules, plain=net.plain), inputs(128)), expected) < 1e-5


def test_writing_in_place_is_refused():
    base = make()
    module = base.model.diffusion_model.qkv
    before = module.weight.dequantize()
    with pytest.raises(CheckpointError, match="in place"):
        module.set_weight(torch.zeros(384, 128), inplace_update=True)
    assert torch.equal(module.weight.dequantize(), before)


def test_others_see_and_set_the_effective_weight():
    """Whoever is not the host's patching gets the weight from convert_weight, and may put another one in."""
    module = make().model.diffusion_model.linear2
    weight = module.convert_weight(module.weight)
    assert rel(weight, torch.cat([layer.weight for layer in layers()["linear2"]], 1)) < 1e-6
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    bias = module.convert_bias(module.bias).float()
    for factor in (3, -2):
        module.set_weight(weight * factor)
        assert rel(run(module, x), torch.nn.functional.linear(x, weight * factor, bias)) < 1e-5


def test_clones_inherit_the_callback_once():
    base = make()
    loading.attach(base)
    from comfy.patcher_extension import CallbacksMP
    assert base.clone().clone().get_all_callbacks(CallbacksMP.ON_LOAD) == [loading.on_load]

"""Merges, differences, hooks, saves and extracted LoRAs of quantized models by ComfyUI's own code, against the dense twin.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from quantized_transformers.quant.layouts.tiled import is_tiled, plain_bias
from support import patch_net as net
from support.patch_net import F32

pytestmark = pytest.mark.unit
TOLERANCE = 1e-4
WIDER = ("convrot w4a4", "W4A4_MXFP4_DUALSCALE")  # than the others, which can be merged with each other
PAIRS = [(name, other) for name in net.FORMATS for other in ("dense", "same", "nvfp4", "svdq linear2")
         if other in ("dense", "same") or name not in WIDER]


def other_of(name: str, other: str):
    """(another model as ComfyUI merges it, its dense twin)."""
    if other == "dense":
        import comfy.ops

        columns = net.make(name)[2]
        layer = comfy.ops.manual_cast.Linear(columns, net.ROWS, bias=True, device="cpu", dtype=F32)
        layer.load_state_dict({"weight": net.rand(net.ROWS, columns, seed=71, scale=columns ** -0.5),
                               "bias": net.rand(net.ROWS, seed=72)})
        patcher = net.patcher_of(net.Net(layer, *net.rest(comfy.ops.manual_cast)))
        return patcher, patcher
    ours, twin, columns = net.make(name if other == "same" else other)
    file = net.files(columns)["bias and norm"]  # which makes it another one, and is to be merged, too
    return net.add(ours, file), net.add(twin, file)


def merge(first, second, ratio):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(first, second, ratio)[0]


@pytest.mark.part(3)
@pytest.mark.parametrize("name, other", PAIRS)
def test_merges(name, other):
    """At 0 / 0.25 / 0.5 / 1; the quantized one first, and second."""
    ours, twin, columns = net.make(name)
    second, second_twin = other_of(name, other)
    for ratio in (0.0, 0.25, 0.5, 1.0):
        for (a, b), (c, d) in (((ours, second), (twin, second_twin)), ((second, ours), (second_twin, twin))):
            expected = net.full(merge(c, d, ratio), columns)
            assert net.rel(net.full(merge(a, b, ratio), columns), expected) < TOLERANCE
            if ratio == 0.25:
                assert net.rel(net.low_vram(merge(a, b, ratio), columns), expected) < TOLERANCE
                if hasattr(a.model.diffusion_model.layer, "held"):
                    assert net.rel(net.dynamic(merge(a, b, ratio), columns), expected) < TOLERANCE


@pytest.mark.parametrize("name", net.FORMATS)
def test_add_subtract_and_blocks(name):
    from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelSubtract

    ours, twin, columns = net.make(name)
    second, second_twin = other_of(name, "same")
    for a, b, c, d in ((ours, second, twin, second_twin), (second, ours, second_twin, twin)):
        difference, expected = ModelSubtract().merge(a, b, 0.7)[0], ModelSubtract().merge(c, d, 0.7)[0]
        assert net.rel(net.full(difference, columns), net.full(expected, columns)) < TOLERANCE
        total, expected = ModelAdd().merge(a, difference)[0], ModelAdd().merge(c, expected)[0]
        assert net.rel(net.full(total, columns), net.full(expected, columns)) < TOLERANCE
        ratios = {"layer": 0.3, "norm": 0.6, "plain": 0.9}
        blocks, expected = (ModelMergeBlocks().merge(*pair, **ratios)[0] for pair in ((a, b), (c, d)))
        assert net.rel(net.full(blocks, columns), net.full(expected, columns)) < TOLERANCE


def hooked(patcher, groups):
    """A clone with hooks (name -> [(file, strength)]) registered, and the groups."""
    import comfy.hooks

    clone, made = patcher.clone(), {}
    for name, loras in groups.items():
        made[name] = comfy.hooks.HookGroup()
        for file, strength in loras:
            hook = comfy.hooks.WeightHook(strength_model=strength)
            assert clone.add_hook_patches(hook, net.patches_of(file), strength)
            made[name].add(hook)
    return clone, made


@pytest.mark.part(2)
@pytest.mark.parametrize("state", ["full", "low VRAM"])
@pytest.mark.parametrize("name", net.FORMATS)
def test_hooks_come_and_go(name, state):
    """As conditionings with hooks of their own do while a model samples; on a model with a LoRA and without."""
    ours, twin, columns = net.make(name)
    kinds = net.files(columns)
    groups = {"one": [(kinds["kohya"], 0.7)], "two": [(kinds["bias and norm"], 1.0), (kinds["lokr"], 0.5)],
              "dense": [(kinds["dora"], 0.8)]}
    for start in (None, "peft", "oft"):
        a, b = (one if start is None else net.add(one, kinds[start]) for one in (ours, twin))
        (a, mine), (b, theirs) = hooked(a, groups), hooked(b, groups)
        a.patch_model(a.load_device, lowvram_model_memory=state == "low VRAM")
        b.patch_model(b.load_device)
        try:
            for which in (None, "one", "two", "one", None, "dense", "two", "dense", None):
                a.apply_hooks(None if which is None else mine[which])
                b.clean_hooks()  # the twin starts from its own weights each time, and has no cache
                b.apply_hooks(None if which is None else theirs[which])
                assert net.rel(net.run(a, columns), net.run(b, columns)) < 1e-5, which
            a.apply_hooks(mine["one"])
            a.clean_hooks()
            b.clean_hooks()
            assert net.rel(net.run(a, columns), net.run(b, columns)) < 1e-5
        finally:
            a.unpatch_model(a.offload_device)
            b.unpatch_model(b.offload_device)
    assert torch.equal(net.full(ours, columns), net.full(net.make(name)[0], columns))


@pytest.mark.parametrize("name", net.FORMATS)
def test_a_hook_s_strength_follows_its_schedule(name):
    import comfy.hooks

    ours, twin, columns = net.make(name)
    (a, mine), (b, theirs) = (hooked(one, {"one": [(net.files(columns)["kohya"], 1.0)]}) for one in (ours, twin))
    a.patch_model(a.load_device)
    b.patch_model(b.load_device)
    try:
        for strength in (1.0, 0.25, 0.0, 0.9):
            for patcher, groups in ((a, mine), (b, theirs)):
                hook, = groups["one"].hooks
                hook.hook_keyframe = comfy.hooks.HookKeyframeGroup()
                hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=strength))
                hook.hook_keyframe._current_strength = strength
                patcher._handle_changed_hook_keyframes([hook])
                patcher.apply_hooks(groups["one"])
            assert net.rel(net.run(a, columns), net.run(b, columns)) < 1e-5
    finally:
        a.unpatch_model(a.offload_device)
        b.unpatch_model(b.offload_device)


def loaded_again(path: str, columns: int):
    """A saved net, whose layer is loaded as any is."""
    import comfy.ops

    from quantized_transformers.quant.linear import with_tiles_of

    saved = load_file(path)
    parts = {name: {k.removeprefix(f"{name}."): v for k, v in saved.items() if k.startswith(f"{name}.")}
             for name in ("layer", "norm", "plain")}
    mixed = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, F32))
    layer, (norm, plain) = net.linear_of(parts["layer"], columns), net.rest(mixed)
    norm.load_state_dict(parts["norm"])
    plain.load_state_dict(parts["plain"])
    return net.patcher_of(net.Net(layer, norm, plain)), layer


@pytest.mark.parametrize("state", ["full", "low VRAM"])
@pytest.mark.parametrize("name", net.FORMATS)
def test_comfyui_s_save_nodes(name, state, tmp_path):
    """What ModelSave and save_checkpoint write gives what the model gives, with deltas of any kind and after a merge."""
    import comfy.utils

    ours, _, columns = net.make(name)
    second, _ = other_of(name, "same")
    made = {kind: net.add(ours, net.files(columns)[kind]) for kind in ("kohya", "rows", "lokr", "dora", "bias and norm")}
    made["merge"] = merge(ours, second, 0.5)
    for kind, patched in made.items():
        expected, path = net.full(patched, columns), str(tmp_path / f"{kind}.safetensors")
        patched.patch_model(patched.load_device, lowvram_model_memory=state == "low VRAM")
        try:
            sd = patched.model_state_dict_for_saving(patched.model.diffusion_model, "diffusion_model.")
            comfy.utils.save_torch_file(sd, path)
        finally:
            patched.unpatch_model(patched.offload_device)
        again, layer = loaded_again(path, columns)
        assert net.rel(net.full(again, columns), expected) < 1e-5, kind
        if kind in ("kohya", "rows") and name not in ("fp8 e5m2", "convrot w4a4"):
            assert is_tiled(layer.weight)  # the quantized bytes with a low-rank pair


@pytest.mark.parametrize("name", net.FORMATS)
def test_extracted_loras(name):
    """Extract and Save LoRA on the difference of a model with a LoRA and the one without."""
    from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model
    from comfy_extras.nodes_model_merging import ModelSubtract

    ours, twin, columns = net.make(name)
    file = net.files(columns)["bias and norm"]
    out = {}
    for which, one in (("ours", ours), ("twin", twin)):
        for state in ("full", "low VRAM") if which == "ours" else ("full",):
            difference = ModelSubtract().merge(net.add(one, file), one, 1.0)[0]
            difference.patch_model(difference.load_device, lowvram_model_memory=state == "low VRAM")
            import comfy.model_management

            kept, comfy.model_management.load_models_gpu = comfy.model_management.load_models_gpu, lambda models: None
            try:
                for kind in (LORAType.STANDARD, LORAType.FULL_DIFF):
                    made = calc_lora_model(difference, 8, "diffusion_model.", "", {}, kind, bias_diff=True)
                    out[which, state, kind] = made
            finally:
                comfy.model_management.load_models_gpu = kept
                difference.unpatch_model(difference.offload_device)
    for state in ("full", "low VRAM"):
        mine, theirs = (out[which, s, LORAType.FULL_DIFF] for which, s in (("ours", state), ("twin", "full")))
        assert net.rel(mine["layer.diff"], theirs["layer.diff"]) < 2 ** -10  # it is saved in 16 bits
        assert net.rel(mine["layer.diff_b"], theirs["layer.diff_b"]) < 2 ** -10
        pairs = [out[which, s, LORAType.STANDARD] for which, s in (("ours", state), ("twin", "full"))]
        mine, theirs = (one["layer.lora_up.weight"].float() @ one["layer.lora_down.weight"].float() for one in pairs)
        assert net.rel(mine, theirs) < 2 ** -8


def test_the_stored_bias_is_not_the_plain_one():
    """What merges of these layers are about: without it the formats above would prove nothing."""
    layer = net.make("svdq linear2")[0].model.diffusion_model.layer
    assert net.rel(layer.bias, plain_bias(layer.weight, layer.bias)) > 0.01
    assert json.loads(bytes(layer.state_dict()["comfy_quant"].tolist()))["format"] == "qt.tiles"

"""Qwen-Image and Qwen-Image-Edit against diffusers: names, bytes and forwards. ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.qwen_image import QWEN_IMAGE, TIMESTEP_ZERO
from quantized_transformers.loaders.errors import CheckpointError
from support import common
from support import lora as lora_tools
from support import qwen_image as qwen
from support.passthrough import fp8 as fp8_layer

pytestmark = pytest.mark.parity

# fp32 forwards of the same network in two implementations: 2e-7 .. 3e-7 were measured (docs/limits.md).
FORWARD = 1e-5
# FP8 activations: two implementations agree (to 1e-7 .. 8e-6) until one value falls on the other side of a rounding
# step; one such step in the timestep's embedding moves everything (measured 1e-3 .. 2e-3).
EMULATED = 5e-3
EDIT = qwen.inputs(references=1)


@pytest.fixture(autouse=True)
def small_widths():
    with qwen.small_widths():
        yield


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "transformer"
    qwen.make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return qwen.export(qwen.make(), tmp_path_factory.mktemp("qwen fp8"))


@pytest.fixture(scope="module")
def fp8_2511(tmp_path_factory):
    return qwen.export(qwen.make(zero_cond_t=True), tmp_path_factory.mktemp("qwen 2511 fp8"))


@pytest.fixture(scope="module", params=["fp8", "fp8_2511"])
def exported(request):
    return request.getfixturevalue(request.param)


def load(reference, **request):
    return model.load(model.Request(str(reference), **request), quiet=True)


def defer(folder):
    return model.defer(model.Request(str(folder))).patcher


def ref_method(patcher) -> str:
    return patcher.model.diffusion_model.default_ref_method


@pytest.mark.parametrize("heads", [1, 2])
def test_bf16_folder_equals_diffusers(heads, tmp_path):
    reference = qwen.make(heads=heads, seed=heads)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == "QwenImage"
    for inputs in (qwen.inputs(), EDIT):
        expected = qwen.diffusers_velocity(reference.float(), **inputs)
        assert common.rel_l2(qwen.comfy_velocity(loaded.patcher, **inputs), expected) < FORWARD


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_edit_2511_equals_diffusers(heads, references, tmp_path):
    """zero_cond_t, which only config.json tells, reaches the host; without it the result is another."""
    reference = qwen.make(heads=heads, zero_cond_t=True, seed=heads)
    reference.save_pretrained(tmp_path)
    inputs = qwen.inputs(references=references)
    loaded = load(tmp_path)
    assert loaded.description.dims["zero_cond_t"] == 1 and ref_method(loaded.patcher) == "index_timestep_zero"
    expected = qwen.diffusers_velocity(reference.float(), **inputs)
    assert common.rel_l2(qwen.comfy_velocity(loaded.patcher, **inputs), expected) < FORWARD
    if references:
        config = {**common.config_of(tmp_path), "zero_cond_t": False}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert common.rel_l2(qwen.comfy_velocity(load(tmp_path).patcher, **inputs), expected) > 0.01


@pytest.mark.parametrize("form", ["folder", "FP8", "file", "deferred"])
def test_layered_equals_diffusers(form, tmp_path):
    """Layers as frames, and the picture that they are of before them, by a second embedding that is not dropped."""
    reference = qwen.make(layered=True)
    reference.save_pretrained(tmp_path)
    inputs, path = qwen.inputs(frames=3, references=1), tmp_path
    if form == "FP8":  # by hand: ModelOpt's export runs the model without the second embedding's input
        tensors = {name: t.detach() for name, t in reference.state_dict().items()}
        for name in [name for name, t in tensors.items() if name.startswith("transformer_blocks.") and t.ndim == 2]:
            layer, (made, truth) = name.removesuffix("weight"), fp8_layer(tensors.pop(name).float())
            tensors |= {layer + leaf: tensor for leaf, tensor in made.items()}
            reference.float().get_submodule(layer[:-1]).weight.data = truth
        path = common.save(tmp_path / "fp8", tensors, common.config_of(tmp_path))
    if form == "file":
        path = next(tmp_path.glob("*.safetensors")).rename(tmp_path / "layered.safetensors")
        (tmp_path / "config.json").unlink()
    if form == "deferred":
        (tmp_path / "base").mkdir()
        shutil.copy(tmp_path / "config.json", tmp_path / "base")
        loaded = model.override(defer(tmp_path / "base"), model.Request(str(path)))
    else:
        loaded = load(path, compute="dequantize")
    assert ref_method(loaded.patcher) == "negative_index"
    assert not any("zero_cond_t" in note for note in loaded.description.notes)  # which nothing leaves open
    expected = qwen.diffusers_velocity(reference.float(), **inputs)
    assert common.rel_l2(qwen.comfy_velocity(loaded.patcher, **inputs), expected) < FORWARD
    reference.time_text_embed.addition_t_embedding.weight.zero_()
    assert common.rel_l2(qwen.diffusers_velocity(reference, **inputs), expected) > 0.01


def test_layered_is_no_base_of_another(tmp_path):
    for layered in (False, True):
        qwen.make(layered=layered).save_pretrained(tmp_path / str(layered))
    for layered in (False, True):
        with pytest.raises(CheckpointError, match="layered"):
            model.override(load(tmp_path / str(layered)).patcher, model.Request(str(tmp_path / str(not layered))))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("marked", [False, True])
def test_single_files(prefix, marked, tmp_path):
    """No config.json; Edit-2511 is told by the host's mark, where the file has it."""
    reference = qwen.make(zero_cond_t=marked)
    tensors = {prefix + name: p.detach() for name, p in reference.named_parameters()}
    if marked:
        tensors[prefix + TIMESTEP_ZERO] = torch.zeros(0)
    loaded = load(common.save(tmp_path, tensors, None, name="qwen.safetensors") / "qwen.safetensors")
    assert loaded.description.naming == Naming("native" if prefix else "diffusers", prefix)
    assert ("zero_cond_t" in loaded.description.dims) == marked
    expected = qwen.diffusers_velocity(reference.float(), **EDIT)
    assert common.rel_l2(qwen.comfy_velocity(loaded.patcher, **EDIT), expected) < FORWARD


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_real_size_has_the_hosts_names_and_shapes(zero_cond_t, tmp_path):
    """Qwen-Image as published, without memory and without the shim: diffusers, host and our table agree on it all."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        reference = QwenImageTransformer2DModel(zero_cond_t=zero_cond_t)
    assert sum(p.numel() for p in reference.parameters()) > 20e9
    config = {"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": zero_cond_t}  # all else by default
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    patcher = defer(tmp_path)
    host = {name: p.shape for name, p in patcher.model.diffusion_model.named_parameters()}
    assert host == {name: p.shape for name, p in reference.named_parameters()}
    assert ref_method(patcher) == ("index_timestep_zero" if zero_cond_t else "index")
    modules = QWEN_IMAGE.modules(QWEN_IMAGE.dims_from_config(config), Naming("diffusers"))
    assert [m.stored for m in modules] == [(m.native,) for m in
                                           QWEN_IMAGE.modules(QWEN_IMAGE.dims_from_config(config), Naming("native"))]


def test_what_is_quantized_stays_quantized_exactly(exported):
    """Every weight is fp8 x scale of the stored bytes, and FP8 in memory."""
    tensors = common.stored(exported)
    loaded = load(exported)
    parameters = {n: p for n, p in loaded.patcher.model.diffusion_model.named_parameters() if "input_scale" not in n}
    expected = common.dequantize(tensors)
    assert parameters.keys() == expected.keys()
    wrong = [name for name, p in parameters.items()
             if not torch.equal(p.dequantize() if hasattr(p, "_layout_cls") else p.float(), expected[name])]
    assert not wrong
    fp8 = {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert len(fp8) > 20 and loaded.description.formats["FP8"] == len(fp8)
    assert {name for name, p in parameters.items() if hasattr(p, "_qdata")} == fp8
    assert loaded.description.family == "modelopt-fp8"


def test_emulated_forward_equals_dequantized_weights(exported):
    """The default on this CPU: FP8 in memory, full-precision matmul."""
    reference = qwen.emulate(common.dequantize(common.stored(exported)), common.config_of(exported))
    expected = qwen.diffusers_velocity(reference, **EDIT)
    for compute in ("auto", "dequantize"):
        actual = qwen.comfy_velocity(load(exported, compute=compute).patcher, **EDIT)
        assert common.rel_l2(actual, expected) < FORWARD


def test_static_forward_equals_emulation(exported):
    reference = qwen.emulate(common.stored(exported), common.config_of(exported))
    patcher = load(exported, compute="native").patcher
    several = [qwen.inputs(references=1, seed=seed) for seed in (1, 2, 5)]
    errors = [common.rel_l2(qwen.comfy_velocity(patcher, **i), qwen.diffusers_velocity(reference, **i)) for i in several]
    assert min(errors) < FORWARD and max(errors) < EMULATED
    weight_only = qwen.comfy_velocity(load(exported).patcher, **EDIT)
    assert common.rel_l2(weight_only, qwen.diffusers_velocity(reference, **EDIT)) > 2 * EMULATED  # not activations too


def test_every_tensor_stays_the_mapped_file(exported):
    """Nothing is fused or swapped in Qwen-Image, so nothing is copied before the host's call."""
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate
    from support.common import assembled

    checkpoint = Checkpoint(locate(str(exported)))
    description = describe(checkpoint)
    stored = checkpoint.load_tensors()
    mapped = {name: (t.untyped_storage().data_ptr(), t.storage_offset()) for name, t in stored.items()}
    native = assembled(QWEN_IMAGE, description.dims, description.naming, stored).tensors
    same = {name: (t.untyped_storage().data_ptr(), t.storage_offset()) == mapped.get(name) for name, t in native.items()}
    assert {name for name in same if not same[name]} == {
        name for name in native if name == TIMESTEP_ZERO or name.endswith(".comfy_quant")}


@pytest.mark.parametrize("kind", ["component", "weights"])
def test_override_of_a_deferred_base(kind, exported):
    direct = load(exported).patcher
    result = model.override(defer(exported), model.Request(str(exported)), kind).patcher
    assert ref_method(result) == ref_method(direct)
    assert torch.equal(qwen.comfy_velocity(result, **EDIT), qwen.comfy_velocity(direct, **EDIT))


def test_weights_keep_the_bases_zero_cond_t(fp8, fp8_2511, tmp_path):
    """A file of weights says nothing of zero_cond_t; a config beside them is the override's own and not used."""
    expected = qwen.diffusers_velocity(qwen.emulate(common.dequantize(common.stored(fp8)),
                                                    common.config_of(fp8_2511)), **EDIT)
    file = shutil.copy(next(fp8.glob("*.safetensors")), tmp_path)
    for base in (defer(fp8_2511), load(fp8_2511).patcher):
        for reference, kind in ((file, "auto"), (fp8, "weights")):
            result = model.override(base, model.Request(str(reference)), kind).patcher
            assert ref_method(result) == "index_timestep_zero"
            assert common.rel_l2(qwen.comfy_velocity(result, **EDIT), expected) < FORWARD
            factory, arguments = result.cached_patcher_init
            assert ref_method(factory(*arguments)) == "index_timestep_zero"


def test_contradictions_about_zero_cond_t_are_refused(bf16, fp8, fp8_2511, tmp_path):
    tensors = {**common.stored(bf16), TIMESTEP_ZERO: torch.zeros(0)}
    marked = common.save(tmp_path, tensors, common.config_of(bf16))
    with pytest.raises(CheckpointError, match="config.json says zero_cond_t = 0, but the tensors have 1"):
        load(marked)
    with pytest.raises(CheckpointError, match="the base model has zero_cond_t = 0, but the tensors have 1"):
        model.override(defer(bf16), model.Request(str(marked)), "weights")
    for base, component, difference in ((fp8_2511, fp8, "zero_cond_t 0 .base 1."), (fp8, fp8_2511, "1 .base 0.")):
        with pytest.raises(CheckpointError, match=difference):
            model.override(defer(base), model.Request(str(component)), "component")


def test_saved_by_the_host_and_loaded_again(fp8_2511, tmp_path):
    """ComfyUI's own save keeps the mark, so no config is needed any more."""
    import comfy.sd

    patcher = load(fp8_2511).patcher
    expected = qwen.comfy_velocity(patcher, **EDIT)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patcher)
    again = load(tmp_path / "saved.safetensors")
    assert again.description.naming.prefix and again.description.dims["zero_cond_t"] == 1
    assert torch.equal(qwen.comfy_velocity(again.patcher, **EDIT), expected)


LORA = lora_tools.random_lora({"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.attn.add_v_proj": (256, 256),
                         "transformer_blocks.1.img_mlp.net.2": (256, 1024), "transformer_blocks.1.attn.to_out.0": (256, 256),
                         "transformer_blocks.0.img_mod.1": (1536, 256), "proj_out": (64, 256)})


def full(patcher):
    return qwen.comfy_velocity(patcher, **EDIT)


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: qwen.comfy_velocity(p, load=False, **EDIT))


@pytest.mark.parametrize("mode", [full, low_vram])
def test_lora_has_the_effect_it_has_on_bf16(mode, bf16, fp8, tmp_path):
    base, quantized = load(bf16).patcher, load(fp8).patcher
    effect = full(lora_tools.load_lora(base, LORA, tmp_path)) - full(base)
    assert effect.norm() > 0.3 * full(base).norm()  # large against rounding
    on_fp8 = mode(lora_tools.load_lora(quantized, LORA, tmp_path)) - mode(quantized)
    assert abs(float(on_fp8.norm() / effect.norm()) - 1) < 0.05
    assert float((on_fp8.double() * effect.double()).sum() / (on_fp8.double().norm() * effect.double().norm())) > 0.99


def test_lora_is_the_definition(bf16, fp8, tmp_path):
    """W + B A on the dequantized weights: fully loaded for BF16; for FP8 when patched as each layer runs."""
    for folder, mode in ((bf16, full), (fp8, low_vram)):
        merged = qwen.emulate(lora_tools.merge(common.stored(folder), LORA), common.config_of(folder))
        patcher = lora_tools.load_lora(load(folder).patcher, LORA, tmp_path)
        assert common.rel_l2(mode(patcher), qwen.diffusers_velocity(merged, **EDIT)) < FORWARD


def names() -> list[str]:
    return [name for name, _ in qwen.make(heads=1, layers=1).named_parameters()]


NOT_QWEN = {
    "ControlNet": lambda n: [*n, "controlnet_blocks.0.weight", "controlnet_x_embedder.weight"],
    "Nunchaku": lambda n: [name.replace("attn.to_q.weight", "attn.to_qkv.qweight") for name in n],
    "Nunchaku's modulation": lambda n: [name.replace("_mod.1.weight", "_mod.1.qweight") for name in n],
    "LoRA": lambda n: [name.replace(".weight", ".lora_A.weight") for name in n],
    "LoRA with a prefix": lambda n: [f"transformer.{name.replace('.weight', '.lora_A.weight')}" for name in n],
    "Lens": lambda n: [name.replace("img_mlp.net.0.proj", "img_mlp.w1") for name in n],
    "another prefix": lambda n: [f"net.{name}" for name in n],
}


@pytest.mark.parametrize("what", NOT_QWEN)
def test_others_are_not_claimed(what):
    assert QWEN_IMAGE.naming(names()) == Naming("diffusers")
    assert QWEN_IMAGE.naming(NOT_QWEN[what](names())) is None


def test_mage_flow_is_no_qwen_image(tmp_path):
    """Its tensors are called as Qwen-Image's; the host tells it by two widths, and has its other sizes in its code."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    QwenImageTransformer2DModel(num_layers=1, num_attention_heads=1, joint_attention_dim=2560, in_channels=128,
                                patch_size=1, out_channels=128).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this MageFlow checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("entries", [{"attention_head_dim": 64}, {"axes_dims_rope": [32, 48, 48]}, {"patch_size": 1},
                                     {"out_channels": 32}, {"use_additional_t_cond": True}, {"use_layer3d_rope": True},
                                     {"use_additional_t_cond": True, "use_layer3d_rope": True, "zero_cond_t": True}])
def test_what_the_host_cannot_run_is_refused(entries, bf16, tmp_path):
    config = {**common.config_of(bf16), **entries}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="Qwen-Image"):
        defer(tmp_path)
    shutil.copy(next(bf16.glob("*.safetensors")), tmp_path)
    with pytest.raises(CheckpointError, match="config.json"):
        load(tmp_path)


def test_a_qwen_image_of_the_hosts_own_loader_is_a_base(bf16, fp8):
    import comfy.sd

    base = comfy.sd.load_diffusion_model(str(next(bf16.glob("*.safetensors"))))
    assert model.base_of(base) == ("Qwen-Image", {"layers": 2, "in": 64, "text": 64, "layered": 0, "zero_cond_t": 0})
    assert torch.equal(full(model.override(base, model.Request(str(fp8))).patcher), full(load(fp8).patcher))

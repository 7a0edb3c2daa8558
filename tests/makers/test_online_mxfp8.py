"""Ascend MXFP8 Quantize: weights against an independent MX coder, forwards against diffusers on the decoded weights."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.builders.presets import PRESETS, variants
from support import common, families, flux, lora, wan
from support.mx import mx

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # fp32 forwards of the same network in two implementations (test_flux1.py)
# What the published checkpoints keep, in diffusers' names (docs/sources/sglang.md, "FP8 presets"): FLUX.1 has a
# list, Wan has none.
KEEPS = {"flux": r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear|transformer_blocks\.\d+\.(ff|ff_context)\.net|"
                 r"single_transformer_blocks\.\d+\.norm\.linear", "wan": r"$ nothing"}


@pytest.fixture(scope="module", params=["flux", "wan"])
def tiny_model(request, tmp_path_factory):
    """A tiny float model: support module, folder, and the diffusers model in F32 with and without MXFP8 weights."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def flux_model(tmp_path_factory):
    return make("flux", tmp_path_factory.mktemp("flux1"))


def make(name, folder):
    support = {"flux": flux, "wan": wan}[name]
    made = support.make()
    made.save_pretrained(folder)
    return SimpleNamespace(name=name, support=support, folder=folder, float=made.float(),
                           coded=coded(support, KEEPS[name]))


def coded(support, keep: str, seed: int = 0):
    """diffusers' model in F32 whose Linear weights, but for those that `keep` finds, went through MX."""
    reference = support.make(seed=seed).float()
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and not re.search(keep, name):
                module.weight.copy_(mx(module.weight))
    return reference


def load(tiny, **request):
    return model.load(model.Request(str(getattr(tiny, "folder", tiny)), **request), quiet=True).patcher


def run(tiny, patcher, **kwargs):
    return tiny.support.comfy_velocity(patcher, **tiny.support.inputs(), **kwargs)


def expected(tiny, reference=None):
    return tiny.support.diffusers_velocity(reference or tiny.coded, **tiny.support.inputs())


def weights(patcher) -> dict[str, torch.Tensor]:
    return {name: p.dequantize() if hasattr(p, "_layout_cls") else p
            for name, p in patcher.model.diffusion_model.named_parameters()}


def quantized(patcher) -> set[str]:
    return {name for name, module in patcher.model.diffusion_model.named_modules()
            if getattr(module, "quant_format", None) == "mxfp8"}


def test_weights_are_the_definition_and_the_rest_is_bit_equal(tiny_model):
    base = load(tiny_model)
    patcher, report = online_mxfp8.quantize(base)
    before, after, layers = weights(base), weights(patcher), quantized(patcher)
    assert before.keys() == after.keys() and f"MXFP8: {len(layers)} Linear layers" in report
    linears = {name for name, module in base.model.diffusion_model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linears if re.search(r"_mod\.lin$|modulation\.lin$|_mlp\.[02]$", name)}
    assert layers == (linears - kept if tiny_model.name == "flux" else linears)
    assert ("preset flux1" in report) == (tiny_model.name == "flux")
    for name, tensor in before.items():
        if name.removesuffix(".weight") in layers:
            assert torch.equal(after[name], mx(tensor)), name
            # 3 bits of mantissa; docs/sources/ascend.md, "Stored tensors", has .029 for
            # the same rule on much data, which layers of 8192 scatter around
            assert 0.024 < flux.rel_l2(after[name], tensor) < 0.034, name
        else:
            assert torch.equal(after[name], tensor), name


def test_forward_is_diffusers_with_these_weights(tiny_model):
    patcher, _ = online_mxfp8.quantize(load(tiny_model))
    out = run(tiny_model, patcher)
    assert flux.rel_l2(out, expected(tiny_model)) < FORWARD
    # weights alone, 0.027 each, add up over the layers of the residual stream
    assert 0.01 < flux.rel_l2(out, expected(tiny_model, tiny_model.float)) < 0.12


def test_the_bases_patches_stay_patches(flux_model, tmp_path):
    """A LoRA before the node and behind it are the same, and in low VRAM exactly W_decoded + B A."""
    names = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.1.ff.net.2": (256, 1024),
             "single_transformer_blocks.1.proj_out": (256, 1280)}
    tensors = lora.random_lora(names)
    plain = load(flux_model)
    with_lora = lora.load_lora(plain, tensors, tmp_path)
    early, report = online_mxfp8.quantize(with_lora)
    late = lora.load_lora(online_mxfp8.quantize(plain)[0], tensors, tmp_path)
    assert "patches carried over: 3" in report and early.patches.keys() == late.patches.keys()
    low = [lora.low_vram(p, lambda p: run(flux_model, p, load=False)) for p in (early, late)]
    assert torch.equal(*low)
    merged = coded(flux, KEEPS["flux"])
    with torch.no_grad():
        for name in names:
            merged.get_submodule(name).weight += (tensors[f"transformer.{name}.lora_B.weight"]
                                                  @ tensors[f"transformer.{name}.lora_A.weight"])
    assert flux.rel_l2(low[0], expected(flux_model, merged)) < FORWARD
    # fully loaded, the host rounds the patched weights to MXFP8 again
    effect = run(flux_model, with_lora) - run(flux_model, plain)
    full = run(flux_model, early) - run(flux_model, online_mxfp8.quantize(plain)[0])
    assert flux.rel_l2(full, effect) < 0.2 and effect.norm() > 0.3 * run(flux_model, plain).norm()


def test_the_incoming_model_is_not_changed(flux_model, tmp_path):
    """Not even when it is loaded, with a LoRA patched into its weights at that moment."""
    plain = load(flux_model)
    tensors = lora.random_lora({"transformer_blocks.0.attn.to_q": (256, 256)})
    base = lora.load_lora(plain, tensors, tmp_path)
    out = run(flux_model, base)  # leaves the weights patched
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert name in base.backup
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in base.model.state_dict().items()}
    options, patches = str(base.model_options), dict(base.patches)
    patcher, _ = online_mxfp8.quantize(base)
    run(flux_model, patcher)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    original = weights(load(flux_model))
    clean, _ = online_mxfp8.quantize(plain)
    key = name.removeprefix("diffusion_model.")
    assert torch.equal(weights(clean)[key], mx(original[key]))
    assert torch.equal(weights(patcher)[key], mx(original[key]))  # not of the patched weight
    assert (str(base.model_options), dict(base.patches)) == (options, patches)
    after = base.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, (_, v) in before.items() if k != name)
    assert torch.equal(after[name], original[key])
    assert torch.equal(run(flux_model, base), out)


def test_what_stays_is_shared(flux_model):
    base = load(flux_model)
    patcher, _ = online_mxfp8.quantize(base)
    key = "double_blocks.0.img_mod.lin.weight"
    assert weights(patcher)[key].data_ptr() == weights(base)[key].data_ptr()


@pytest.mark.parametrize(("keep", "stays"), [
    (r"transformer_blocks\.0\.attn\.to_k$", {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"}),
    ("single_blocks\n  final_layer  \n\n", {*(f"single_blocks.{i}.{part}" for i in (0, 1) for part in (
        "linear1", "linear2", "modulation.lin")), "final_layer.linear", "final_layer.adaLN_modulation.1"}),
    ("^$", set())])
def test_patterns(keep, stays, flux_model):
    patcher, report = online_mxfp8.quantize(load(flux_model), keep)
    linears = {name for name, module in load(flux_model).model.diffusion_model.named_modules()
               if isinstance(module, torch.nn.Linear)}
    assert linears - quantized(patcher) == stays
    assert ("match no layer: ^$" in report) == (keep == "^$")
    if keep.startswith("transformer"):  # by diffusers' name, anchored at neither end: finds single_transformer_blocks
        reference = coded(flux, r"transformer_blocks\.0\.attn\.to_[qkv]$|single_transformer_blocks\.0\.proj_mlp"
                                r"|transformer_blocks\.0\.attn\.to_k$")
        assert flux.rel_l2(run(flux_model, patcher), expected(flux_model, reference)) < FORWARD


@pytest.mark.parametrize("name", ["flux1", "flux2", "hunyuan_video", "qwen_image"])
def test_every_preset_pattern_finds_something(name):
    """In diffusers' own model."""
    family = families.FAMILIES[name]
    with family.ready():
        names = [n for n, m in family.support.make().named_modules() if hasattr(m, "weight")]  # one is a convolution
    for pattern in PRESETS[name.replace("_", "-")].keep:
        assert any(re.search(pattern, other) for n in names for other in variants(n, "")), pattern


@pytest.mark.parametrize("name", ["flux2", "hunyuan_video", "qwen_image"])
def test_other_architectures(name, tmp_path):
    family = families.FAMILIES[name]
    with family.ready():
        made = family.support.make()
        made.save_pretrained(tmp_path)
        patcher, _ = online_mxfp8.quantize(model.load(model.Request(str(tmp_path)), quiet=True).patcher)
        keep = "|".join(PRESETS[name.replace("_", "-")].keep)
        reference = family.support.make().float()
        with torch.no_grad():
            for n, module in reference.named_modules():
                kept = any(re.search(keep, other) for other in variants(n, ""))
                if isinstance(module, torch.nn.Linear) and not kept \
                        and module.weight.shape[0] % 32 == 0 and module.weight.shape[1] % 32 == 0:
                    module.weight.copy_(mx(module.weight))
        out = family.run(patcher)
        assert flux.rel_l2(out, family.support.diffusers_velocity(reference, **family.support.inputs())) < FORWARD


def test_sizes_that_are_no_multiple_of_32_stay(tmp_path):
    from diffusers import FluxTransformer2DModel

    config = {**flux.make(double=1, single=1).config, "pooled_projection_dim": 40, "num_layers": 1,
              "num_single_layers": 1}
    torch.manual_seed(0)
    made = flux.randomise(FluxTransformer2DModel.from_config(config))
    made.save_pretrained(tmp_path)
    base = load(tmp_path)
    patcher, report = online_mxfp8.quantize(base, "^$")
    assert "no multiple of 32: 1: vector_in.in_layer" in report
    assert torch.equal(weights(patcher)["vector_in.in_layer.weight"], weights(base)["vector_in.in_layer.weight"])
    reference = made.float()
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features != 40:
                module.weight.copy_(mx(module.weight))
    inputs = flux.inputs() | {"pooled": torch.randn(2, 40)}
    assert flux.rel_l2(flux.comfy_velocity(patcher, **inputs), flux.diffusers_velocity(reference, **inputs)) < FORWARD


def test_the_host_can_rebuild_it(tiny_model):
    """cached_patcher_init, as multi-GPU and non-dynamic clones use it."""
    patcher, _ = online_mxfp8.quantize(load(tiny_model), "self_attn|img_attn")
    factory, arguments = patcher.cached_patcher_init
    made = factory(*arguments, disable_dynamic=True)
    assert quantized(made) == quantized(patcher) and made.model is not patcher.model
    copy = patcher.deepclone_multigpu()
    assert copy.model is not patcher.model and torch.equal(run(tiny_model, copy), run(tiny_model, patcher))


def test_a_base_of_the_hosts_own_loaders(flux_model, tmp_path):
    import comfy.sd

    file = str(next(flux_model.folder.glob("*.safetensors")))
    patcher, _ = online_mxfp8.quantize(comfy.sd.load_diffusion_model(file))
    assert torch.equal(run(flux_model, patcher), run(flux_model, online_mxfp8.quantize(load(flux_model))[0]))
    assert torch.equal(run(flux_model, patcher.deepclone_multigpu()), run(flux_model, patcher))
    # a third entry says which of several results is the model: a whole checkpoint file
    path = str(tmp_path / "checkpoint.safetensors")
    comfy.sd.save_checkpoint(path, load(flux_model))
    base = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    assert len(base.cached_patcher_init) == 3
    again, _ = online_mxfp8.quantize(base)
    assert torch.equal(run(flux_model, again.deepclone_multigpu()), run(flux_model, patcher))


def test_saved_by_the_host_and_loaded_by_stock_comfyui(tiny_model, tmp_path):
    import comfy.sd

    patcher, _ = online_mxfp8.quantize(load(tiny_model))
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    stock = comfy.sd.load_diffusion_model(path)
    here, there = weights(patcher), weights(stock)
    assert quantized(stock) == quantized(patcher) and here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert common.rel_l2(run(tiny_model, stock), run(tiny_model, patcher)) < common.SUMS


def test_cancel_leaves_the_base_usable(flux_model):
    import comfy.model_management as management

    base = load(flux_model)
    before = run(flux_model, base)
    done = 0

    def step():
        nonlocal done
        done += 1
        if done == 5:
            management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        online_mxfp8.quantize(base, step=step)
    assert done == 5
    management.interrupt_current_processing(True)  # the default looks for it, too
    with pytest.raises(management.InterruptProcessingException):
        online_mxfp8.quantize(base)
    assert torch.equal(run(flux_model, base), before) and not quantized(base)
    online_mxfp8.quantize(base)


def test_one_layer_at_a_time(flux_model, monkeypatch):
    """A weight is coded when the one before is done, not all at once."""
    events = []
    layer = online_mxfp8._layer
    monkeypatch.setattr(online_mxfp8, "_layer", lambda *a: (events.append("code"), layer(*a))[1])
    online_mxfp8.quantize(load(flux_model), step=lambda: events.append("done"))
    assert events == ["code", "done"] * (len(events) // 2) and len(events) > 20


@pytest.mark.parametrize("which", ["mixed", "nvfp4_mixed"])
def test_layers_that_are_quantized_already(which, tiny):
    """A ModelOpt export with BF16 layers: FP8, NVFP4 and row shards stay, the others become MXFP8."""
    base = load(getattr(tiny, which))
    before = {name: p for name, p in base.model.diffusion_model.named_parameters() if hasattr(p, "_layout_cls")}
    patcher, report = online_mxfp8.quantize(base, "final_layer")
    assert f"quantized already, left as they are: {len(before)}" in report
    assert not {f"{name}.weight" for name in quantized(patcher)} & before.keys()
    after = weights(patcher)
    assert all(torch.equal(after[name], p.dequantize()) for name, p in before.items())
    tensors = flux.dequantize(flux.stored(getattr(tiny, which)))
    linears = {f"{n}.weight" for n, m in flux.make().named_modules() if isinstance(m, torch.nn.Linear)}
    plain = {name for name, t in flux.stored(getattr(tiny, which)).items() if t.dtype == torch.bfloat16 and name in linears}
    fused = {name for name in plain if "single" in name and "proj_mlp" in name}  # shares its module with q, k, v
    # the loader decodes this one, because ComfyUI reads a size from its columns
    plain |= {"time_text_embed.text_embedder.linear_1.weight"} if which == "nvfp4_mixed" else set()
    tensors |= {name: mx(tensors[name]) for name in plain - fused if not name.startswith(("proj_out", "norm_out"))}
    reference = flux.emulate(tensors, flux.config_of(getattr(tiny, which)))
    out = flux.comfy_velocity(patcher, **flux.inputs())
    assert flux.rel_l2(out, flux.diffusers_velocity(reference, **flux.inputs())) < FORWARD


def test_reference_backend_is_the_npus_arithmetic(flux_model):
    """Activations too: a diffusers model whose Linear inputs go through the same MX rule."""
    patcher, report = online_mxfp8.quantize(load(flux_model), backend="reference")
    assert "W8A8_MXFP8 runs: reference (as chosen)" in report
    emulated = coded(flux, KEEPS["flux"])
    for name, module in emulated.named_modules():
        if isinstance(module, torch.nn.Linear) and not re.search(KEEPS["flux"], name):
            module.register_forward_pre_hook(lambda _, args: (mx(args[0].reshape(-1, args[0].shape[-1])).view(
                args[0].shape),))
    assert flux.agrees(patcher, emulated)
    assert not flux.agrees(patcher, flux_model.coded)  # the activations really are quantized above


def test_dtype_of_the_base(flux_model):
    for dtype in ("fp16", "bf16"):
        base = load(flux_model, dtype=dtype)
        patcher, _ = online_mxfp8.quantize(base)
        key = "double_blocks.0.img_mod.lin.weight"
        assert patcher.model.get_dtype() == base.model.get_dtype()
        assert patcher.model.get_dtype_inference() == base.model.get_dtype_inference()
        assert torch.equal(weights(patcher)[key], weights(base)[key].float())  # ComfyUI keeps it as it computes
        assert flux.rel_l2(run(flux_model, patcher), expected(flux_model)) < 0.05  # half precision, a few layers


def test_dtype_that_the_base_computes_in(flux_model):
    """As the host decides it on a GPU; on this CPU it would be F32."""
    base = load(flux_model)
    base.model.manual_cast_dtype = torch.bfloat16
    patcher, _ = online_mxfp8.quantize(base)
    assert patcher.object_patches["manual_cast_dtype"] == torch.bfloat16
    assert weights(patcher)["double_blocks.0.img_mod.lin.weight"].dtype == torch.bfloat16
    assert 1e-4 < flux.rel_l2(run(flux_model, patcher), expected(flux_model)) < 0.05


def test_slices_of_a_large_weight_are_the_whole(monkeypatch):
    weight = torch.randn(96, 64)
    whole = online_mxfp8._layer("x", weight)
    monkeypatch.setattr(online_mxfp8, "SLICE", 64 * 7)
    parts = online_mxfp8._layer("x", weight)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in whole)


def test_refusals(flux_model, tiny):
    quantize = online_mxfp8.quantize
    with pytest.raises(CheckpointError, match="has no weights yet"):
        quantize(model.defer(model.Request(str(flux_model.folder))).patcher)
    with pytest.raises(CheckpointError, match="no Linear weights to quantize: 36 are quantized already"):
        quantize(quantize(load(flux_model), "^$")[0])
    with pytest.raises(CheckpointError, match="no Linear weights to quantize: 0 are .* 36 are kept"):
        quantize(load(flux_model), ".")
    with pytest.raises(CheckpointError, match=r"keep_high_precision: .*\n.*where: \[a"):
        quantize(load(flux_model), "fine\n[a")
    with pytest.raises(CheckpointError, match="torch_npu is not installed"):
        quantize(load(flux_model), backend="torch_npu")
    with pytest.raises(CheckpointError, match="backend 'cuda', expected one of auto"):
        quantize(load(flux_model), backend="cuda")
    bound = load(flux_model)
    bound.add_object_patch("diffusion_model.double_blocks.0", torch.nn.Identity())
    with pytest.raises(CheckpointError, match="directly behind the loader"):
        quantize(bound)
    damaged = load(flux_model)
    with torch.no_grad():
        damaged.model.diffusion_model.double_blocks[1].txt_attn.proj.weight[3, 7] = float("inf")
    with pytest.raises(CheckpointError, match=r"infinities or NaN\n.*double_blocks.1.txt_attn.proj"):
        quantize(damaged)


def test_node(flux_model):
    from quantized_transformers.nodes.ascend import QT_AscendMXFP8Quantize as Node

    assert Node.define_schema().category == "loaders/quantized"
    patcher, report = Node.execute(load(flux_model), keep_high_precision="single_blocks").args
    assert "1 patterns" in report and not any("single" in name for name in quantized(patcher))

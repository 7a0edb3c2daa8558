"""Apply Transformer Override: the base keeps everything, the result has the override's weights and the base's rest."""

from __future__ import annotations

import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from support import flux

pytestmark = pytest.mark.parity


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True).patcher


def defer(folder):
    return model.defer(model.Request(str(folder))).patcher


def run(patcher):
    return flux.comfy_velocity(patcher, **flux.inputs())


def lora_patches(strength: float = 1.0) -> dict:
    """Full-rank differences for two native weights, as the host stores a merged patch."""
    g = torch.Generator().manual_seed(2)
    return {"diffusion_model.double_blocks.0.img_attn.qkv.weight": ("diff", (torch.randn(768, 256, generator=g) * 0.1,)),
            "diffusion_model.single_blocks.0.linear2.weight": ("diff", (torch.randn(256, 1280, generator=g) * 0.1,))}


@pytest.mark.parametrize("kind", ["auto", "component", "weights"])
@pytest.mark.parametrize("base", ["load", "defer"])
def test_gives_the_overrides_weights(base, kind, tiny):
    patcher = load(tiny.bf16) if base == "load" else defer(tiny.bf16)
    result = model.override(patcher, model.Request(str(tiny.fp8)), kind)
    assert torch.equal(run(result.patcher), run(load(tiny.fp8)))
    assert ("weights only" in result.report) == (kind == "weights")


def test_single_file_is_weights(tiny):
    result = model.override(defer(tiny.bf16), model.Request(str(next(tiny.fp8.glob("*.safetensors")))))
    assert "weights only" in result.report
    with pytest.raises(CheckpointError, match="no component"):
        model.override(defer(tiny.bf16), model.Request(str(next(tiny.fp8.glob("*.safetensors")))), "component")


def test_deferred_base_needs_only_its_config(tiny, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copy(tiny.bf16 / "config.json", tmp_path / "transformer")
    shutil.copy(tiny.pipeline / "model_index.json", tmp_path)
    result = model.override(defer(tmp_path), model.Request(str(tiny.fp8)))
    assert torch.equal(run(result.patcher), run(load(tiny.fp8)))


def test_deferred_base_refuses_to_run_or_save(tiny):
    import comfy.model_management

    for use in (lambda p: run(p), lambda p: run(p.clone()),
                lambda p: comfy.model_management.load_models_gpu([p], force_patch_weights=True)):
        with pytest.raises(CheckpointError, match="has no weights yet"):
            use(defer(tiny.bf16))
    assert all(p.is_meta for p in defer(tiny.bf16).model.diffusion_model.parameters())


def test_deferred_base_knows_its_noise_schedule(tiny):
    """Schedulers read sigmas from a MODEL without running it."""
    import comfy.samplers

    schedule = [comfy.samplers.calculate_sigmas(p.get_model_object("model_sampling"), "simple", 4)
                for p in (defer(tiny.bf16), load(tiny.bf16))]
    assert torch.equal(*schedule)


def test_base_is_not_changed(tiny):
    base = load(tiny.bf16)
    base.add_patches(lora_patches())
    before = run(base)
    options, patches, weights = str(base.model_options), dict(base.patches), base.model
    result = model.override(base, model.Request(str(tiny.fp8))).patcher
    run(result)
    assert (str(base.model_options), dict(base.patches)) == (options, patches)
    assert base.model is weights and result.model is not weights
    assert torch.equal(run(base), before)


def test_patches_and_options_come_along(tiny):
    base = defer(tiny.bf16)
    base.add_patches(lora_patches())
    base.model_options["transformer_options"]["mine"] = 42
    base.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    base.add_object_patch("model_sampling", sampling := base.get_model_object("model_sampling"))
    result = model.override(base, model.Request(str(tiny.fp8)))
    assert "patches carried over from the base MODEL: 2" in result.report
    assert result.patcher.model_options["transformer_options"]["mine"] == 42
    assert "model_function_wrapper" in result.patcher.model_options
    assert result.patcher.get_model_object("model_sampling") is sampling
    after = load(tiny.fp8)
    after.add_patches(lora_patches())
    assert torch.equal(run(result.patcher), run(after))
    assert flux.rel_l2(run(result.patcher), run(load(tiny.fp8))) > 0.05


def test_the_bases_dtype_comes_along(tiny):
    base = model.load(model.Request(str(tiny.bf16), dtype="bf16"), quiet=True).patcher
    result = model.override(base, model.Request(str(tiny.fp8))).patcher
    assert result.model.get_dtype_inference() == torch.float32  # what this CPU would take
    import comfy.model_management

    comfy.model_management.load_models_gpu([result])
    assert result.model.manual_cast_dtype == torch.bfloat16
    base.set_model_compute_dtype(torch.float16)  # ComfyUI's ModelComputeDtype node, behind the base: the later word
    result = model.override(base, model.Request(str(tiny.fp8))).patcher
    assert result.object_patches["manual_cast_dtype"] == torch.float16


def test_two_transformers_stay_apart(tiny, tmp_path):
    """As in Wan2.2: an override of `transformer` leaves `transformer_2` alone, and that has its own."""
    shutil.copytree(tiny.bf16, tmp_path / "transformer")
    second = flux.make(seed=9)
    second.save_pretrained(tmp_path / "transformer_2")
    shutil.copy(tiny.pipeline / "model_index.json", tmp_path)
    flux.export_fp8(second, tmp_path / "second-fp8")
    high, low = (model.defer(model.Request(str(tmp_path), component)).patcher for component in ("transformer", "transformer_2"))
    plain = load(tmp_path, component="transformer_2")
    before = run(plain)
    assert torch.equal(run(model.override(high, model.Request(str(tiny.fp8))).patcher), run(load(tiny.fp8)))
    assert torch.equal(run(plain), before)
    assert flux.rel_l2(before, flux.diffusers_velocity(second.float(), **flux.inputs())) < 1e-5
    own = run(model.override(low, model.Request(str(tmp_path / "second-fp8"))).patcher)
    assert torch.equal(own, run(load(tmp_path / "second-fp8"))) and flux.rel_l2(own, before) < 0.2


def test_weights_never_inherit_the_bases_quantization(tiny):
    """BF16 weights on an FP8 base are BF16 (SGLang's case 445)."""
    result = model.override(load(tiny.fp8), model.Request(str(next(tiny.bf16.glob("*.safetensors")))))
    assert result.description.family == "none" and torch.equal(run(result.patcher), run(load(tiny.bf16)))


def test_bases_of_other_loaders(tiny, tmp_path):
    """A MODEL from ComfyUI's own loader is a base too."""
    import comfy.sd

    base = comfy.sd.load_diffusion_model(str(next(tiny.bf16.glob("*.safetensors"))))
    assert torch.equal(run(model.override(base, model.Request(str(tiny.fp8))).patcher), run(load(tiny.fp8)))


def test_other_models_are_refused(tiny, tmp_path):
    flux.make(heads=1).save_pretrained(tmp_path / "one head")
    flux.make(guidance=False).save_pretrained(tmp_path / "schnell")
    for folder, difference in (("one head", "hidden"), ("schnell", "guidance")):
        for kind in ("component", "weights"):
            with pytest.raises(CheckpointError) as caught:
                model.override(defer(tiny.bf16), model.Request(str(tmp_path / folder)), kind)
            assert difference in str(caught.value) and "base" in str(caught.value)
    base = defer(tiny.bf16)
    base.model.model_config.unet_config = {"image_model": "wan2.1"}
    with pytest.raises(CheckpointError, match="the override is FLUX.1, but the base model is Flux"):
        model.override(base, model.Request(str(tiny.fp8)))


def test_what_holds_on_to_the_old_weights_is_refused(tiny):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = load(tiny.bf16)
    set_torch_compile_wrapper(compiled, backend="eager")
    patched = load(tiny.bf16)
    patched.add_object_patch("diffusion_model.double_blocks.0", torch.nn.Identity())
    for base in (compiled, patched):
        with pytest.raises(CheckpointError, match="directly behind the base"):
            model.override(base, model.Request(str(tiny.fp8)))


def test_the_host_can_rebuild_it(tiny):
    """cached_patcher_init, as multi-GPU and non-dynamic clones use it: same weights, own tensors, patches kept."""
    base = defer(tiny.bf16)
    base.add_patches(lora_patches())
    overridden = model.override(base, model.Request(str(tiny.fp8), compute="native")).patcher
    for patcher in (load(tiny.fp8), overridden):
        expected = run(patcher)
        factory, arguments = patcher.cached_patcher_init
        assert factory(*arguments, disable_dynamic=True).model is not patcher.model
        copy = patcher.deepclone_multigpu()
        assert copy.model is not patcher.model and torch.equal(run(copy), expected)
    deferred = base.deepclone_multigpu()
    with pytest.raises(CheckpointError, match="has no weights yet"):
        run(deferred)


def test_saved_by_the_host_and_loaded_again(tiny, tmp_path):
    """ComfyUI's own save keeps every byte; stock ComfyUI refuses the unknown marker aloud instead of making noise."""
    import comfy.sd
    from safetensors.torch import load_file

    patcher = load(tiny.fp8)
    expected = run(patcher)
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    codes = sorted(t.numel() for t in flux.stored(tiny.fp8).values() if t.dtype == torch.float8_e4m3fn)
    assert sorted(t.numel() for t in load_file(path).values() if t.dtype == torch.float8_e4m3fn) == codes
    again = load(path)
    assert torch.equal(run(again), expected)
    with pytest.raises(KeyError, match="qt.tiles"):
        comfy.sd.load_diffusion_model(path)
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith(".weight_t1_codes"))
    tensors[name] = tensors[name][:100]
    broken = flux.save(tmp_path / "broken", tensors, None)
    with pytest.raises(CheckpointError, match=r"codes is \[100, 256\], expected \[256, 256\]"):
        load(broken)

"""Whole models with patches by ComfyUI's own nodes: the change is that of the dense model, which stock ComfyUI loads and
patches; what is saved samples the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from quantized_transformers.makers.save import save
from quantized_transformers.quant.patches import stand_ins
from support import common, flux, svdquant_models
from support import lora as lora_tools

pytestmark = [pytest.mark.parity, pytest.mark.full]
EXACT = 1e-4  # of an effect, F32
NAMES = ("fp8", "mixed", "nvfp4", "svdq int4", "svdq nvfp4", "mxfp8")
# Of weights quantized once more, to the nearest: half a step of each format's (E4M3 2^-4, E2M1 2^-2), of the output.
AGAIN = {"fp8": 2 ** -4, "mixed": 2 ** -4, "mxfp8": 2 ** -4, "nvfp4": 2 ** -2}
LAYERS = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.0.attn.to_v": (256, 256),
          "transformer_blocks.1.ff.net.2": (256, 1024), "single_transformer_blocks.0.proj_mlp": (1024, 256),
          "single_transformer_blocks.1.proj_out": (256, 1280)}


def load(reference, **request):
    return model.load(model.Request(str(reference), **{"compute": "dequantize", "dtype": "fp32", **request}),
                      quiet=True).patcher


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Name -> (our MODEL, its dense twin by stock ComfyUI)."""
    import comfy.sd

    root = tmp_path_factory.mktemp("svdq")
    made = {"fp8": load(tiny.fp8), "mixed": load(tiny.mixed), "nvfp4": load(tiny.nvfp4)}
    for precision in ("int4", "nvfp4"):
        file = svdquant_models.make_flux(precision).write(root / precision)
        made[f"svdq {precision}"] = load(file)
    made["mxfp8"] = online_mxfp8.quantize(load(tiny.bf16), step=lambda: None)[0]
    return {name: (patcher, comfy.sd.load_diffusion_model_state_dict(dense(patcher), {"dtype": torch.float32}))
            for name, patcher in made.items()}


def dense(patcher):
    """The plain tensors that a MODEL stands for."""
    network = patcher.model.diffusion_model
    tensors = {name: tensor.detach().clone() for name, tensor in network.named_parameters() if "_" not in vars(tensor)
               and not name.endswith(("input_scale",))}
    for name, module in network.named_modules():
        if hasattr(module, "effective"):
            weight, bias = module.effective()
            tensors |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    return tensors


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Name -> file, in a loras folder."""
    import folder_paths

    folder = tmp_path_factory.mktemp("patched loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    g = torch.Generator().manual_seed(5)
    plain = lora_tools.random_lora(LAYERS)
    lokr = {}
    for name, (rows, columns) in (("double_blocks_0_img_attn_qkv", (768, 256)),
                                  ("single_blocks_1_linear2", (256, 1280))):
        lokr[f"lora_unet_{name}.lokr_w1"] = torch.randn(4, 4, generator=g) * 0.3
        lokr[f"lora_unet_{name}.lokr_w2"] = torch.randn(rows // 4, columns // 4, generator=g) * columns ** -0.5
    dora = {f"{n}.dora_scale": torch.rand(LAYERS[n.removeprefix("transformer.")][0], 1, generator=g) + 0.5
            for n in {name.removesuffix(".lora_A.weight") for name in plain} if n.endswith("ff.net.2")}
    for name, tensors in {"plain": plain, "lokr": lokr, "dora": {**plain, **dora}}.items():
        save_file(tensors, str(folder / f"patched_{name}.safetensors"))
    folder_paths.filename_list_cache.clear()
    return lambda name: f"patched_{name}.safetensors"


@pytest.fixture(scope="module")
def nodes():
    """ComfyUI's extra nodes by class."""
    from comfy_extras import nodes_hooks, nodes_model_merging

    return {**vars(nodes_hooks), **vars(nodes_model_merging)}


def lora(patcher, file, strength=1.0):
    from nodes import LoraLoaderModelOnly

    return LoraLoaderModelOnly().load_lora_model_only(patcher, file, strength)[0]


def run(patcher, **options):
    return flux.comfy_velocity(patcher, **flux.inputs(), **options)


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: run(p, load=False))


def off(ours, before, twin, twin_before):
    effect = twin - twin_before
    assert effect.norm() > 1e-2 * twin_before.norm()
    return float((ours - before - effect).norm() / effect.norm())


@pytest.mark.parametrize("name", NAMES)
def test_loras_at_any_strength(name, models, loras):
    ours, twin = models[name]
    before, theirs = run(ours), run(twin)
    assert common.rel_l2(before, theirs) < 1e-5
    for kind in ("plain", "lokr", "dora"):
        for strength in (0.1, 0.3, 1.0, -0.7) if kind == "plain" else (0.8,):
            patched, expected = lora(ours, loras(kind), strength), run(lora(twin, loras(kind), strength))
            for state in (run, low_vram):
                # an effect of a tenth is a small difference of two outputs, each within some 1e-6
                assert off(state(patched), before, expected, theirs) < EXACT
    assert torch.equal(run(ours), before)


def sample(patcher, hooks=None):
    """Two steps of KSampler with prompts of different lengths."""
    from nodes import KSampler

    i = flux.inputs()
    both = [[[i["text"][k:k + 1, :7 - 2 * k], {"pooled_output": i["pooled"][k:k + 1], "guidance": 4.0}]]
            for k in (0, 1)]
    if hooks is not None:
        both[0][0][1]["hooks"] = hooks
    latent = {"samples": torch.zeros_like(i["x"][:1])}
    return KSampler().sample(patcher, 1, 2, 1.5, "euler", "simple", *both, latent, 1.0)[0]["samples"].float()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_one_of_two_prompts(name, models, loras, nodes):
    ours, twin = models[name]
    outs = []
    for patcher in (ours, twin):
        hooks = nodes["CreateHookLora"]().create_hook(loras("plain"), 0.8, 0.0)[0]
        outs.append((sample(patcher, hooks), sample(patcher)))
    assert off(*outs[0], *outs[1]) < 10 * EXACT  # two steps, each with what the other left
    assert torch.equal(sample(ours), sample(ours))


@pytest.mark.parametrize("name", NAMES)
def test_block_and_forward_patches(name, models, loras):
    """What identity adapters and caches do: replace blocks, wrap the network's forward; with a LoRA behind them."""
    def patch(patcher):
        clone = lora(patcher, loras("plain"), 0.5)
        inner = clone.model.diffusion_model.forward_orig

        def block(args, extra):
            out = extra["original_block"](args)
            key = "img" if "img" in out else next(iter(out))
            return {**out, key: out[key] + 0.1 * torch.tanh(out[key])}

        clone.set_model_patch_replace(block, "dit", "double_block", 0)
        clone.set_model_patch_replace(block, "dit", "single_block", 1)
        clone.add_object_patch("diffusion_model.forward_orig", lambda *args, **kwargs: 1.1 * inner(*args, **kwargs))
        return clone

    ours, twin = models[name]
    assert off(sample(patch(ours)), sample(ours), sample(patch(twin)), sample(twin)) < 10 * EXACT


@pytest.mark.parametrize("name", NAMES)
def test_merges_with_a_dense_model_and_each_other(name, models, nodes, loras):
    ours, twin = models[name]
    others = [(lora(models["nvfp4"][1], loras("plain")),) * 2, (lora(models["fp8"][0], loras("plain")),
                                                                 lora(models["fp8"][1], loras("plain")))]
    merge = nodes["ModelMergeSimple"]().merge
    for other, other_twin in others:
        for pair, plain in (((ours, other), (twin, other_twin)), ((other, ours), (other_twin, twin))):
            assert common.rel_l2(run(merge(*pair, 0.25)[0]), run(merge(*plain, 0.25)[0])) < EXACT


@pytest.mark.parametrize("name, memory", [*((name, "full") for name in NAMES),
                                          *((name, "low VRAM") for name in ("mixed", "nvfp4", "svdq int4"))])
def test_saved_models_sample_the_same(name, memory, models, nodes, loras, output, monkeypatch):
    """By this pack's node in its three forms, and by ComfyUI's ModelSave, with patches of every kind."""
    import comfy.model_management
    import comfy.sd

    ours = models[name][0]
    made = {"none": ours, **{kind: lora(ours, loras(kind)) for kind in ("plain", "lokr", "dora")}}
    made["merge"] = nodes["ModelMergeSimple"]().merge(ours, lora(ours, loras("plain")), 0.3)[0]
    load_models = comfy.model_management.load_models_gpu
    for kind, patched in made.items():
        expected = run(patched)
        comfy.model_management.unload_all_models()
        if memory == "low VRAM":
            patched.patch_model(patched.load_device, lowvram_model_memory=1)
            monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **kwargs: None)
        files, forms = {}, ("exact", "stock", "baked") if kind != "lokr" else ("exact",)  # as dora, which is dense, too
        try:
            for form in forms:
                path, report = save(patched, f"{name} {kind} {form}", form, overwrite=True, step=lambda n: None)
                files[form] = str(path)
                assert "it loads with Load Base Model" in report
            prefix = f"{name} {kind} {memory} host"
            nodes["ModelSave"]().save(patched, prefix)
            files["host"] = str(output / f"{prefix}_00001_.safetensors")
        finally:
            monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models)
            if memory == "low VRAM":
                patched.unpatch_model(patched.offload_device)
        for form, path in files.items():
            again = comfy.sd.load_diffusion_model(path, {"dtype": torch.float32}) if form == "stock" else load(path)
            limit = {"stock": 2 ** -7, "baked": AGAIN.get(name, 1e-5)}.get(form, 1e-5)
            assert common.rel_l2(run(again), expected) < limit, (kind, form)


def test_a_wrong_file_is_not_kept(models, loras, output, monkeypatch):
    """What is written is loaded and compared: here the pairs are written as zeros."""
    patched = lora(models["fp8"][0], loras("plain"))
    monkeypatch.setattr(stand_ins.Lazy, "to", lambda self, *_, **__: torch.zeros(self.shape, dtype=self.dtype))
    with pytest.raises(CheckpointError, match="does not load as the MODEL has it"):
        save(patched, "wrong", step=lambda n: None)
    assert not list(output.glob("wrong*"))


def test_the_same_quantized_bytes_and_a_pair(models, loras, output):
    patched = lora(models["fp8"][0], loras("plain"))
    before = load_file(str(save(models["fp8"][0], "without", step=lambda n: None)[0]))
    path, report = save(patched, "with", step=lambda n: None)
    after = load_file(str(path))
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in before.items()
               if tensor.dtype == torch.float8_e4m3fn)
    assert sum(name.endswith("_down") for name in after) >= 4  # q and v are of one native layer
    assert "have theirs beside the quantized weight" in report


def test_mxfp8_of_a_model_with_patches(models, loras):
    """Ascend MXFP8 Quantize takes any MODEL of ours: quantized layers stay, with what is beside them."""
    for name in ("svdq int4", "nvfp4"):
        ours, twin = models[name]
        patched = lora(lora(ours, loras("plain")), loras("dora"), 0.5)
        expected = run(lora(lora(twin, loras("plain")), loras("dora"), 0.5))
        made, _ = online_mxfp8.quantize(patched, keep="final_layer", step=lambda: None)
        assert common.rel_l2(run(made), expected) < 0.15  # MXFP8 of the plain layers
        assert common.rel_l2(run(patched), expected) < EXACT



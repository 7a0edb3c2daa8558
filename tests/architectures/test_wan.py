"""Wan against diffusers: bytes, forwards, overrides and LoRAs. Names are in test_wan_names.py.
ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.wan import WAN
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from support import lora as lora_tools
from support import wan
from support.common import assembled, config_of, dequantize, model_folder, quantized_fp8, rel_l2, save, stored

pytestmark = pytest.mark.parity

# fp32 forwards of the same network in two implementations: 2e-6 .. 2.5e-6 were measured (docs/limits.md).
FORWARD = 1e-5
# FP8 activations: two implementations agree until one value falls on the other side of a rounding step.
EMULATED = 1e-3
VARIANTS = list(wan.VARIANTS)
# What the host makes of each: its class, channels in and out (comfy/supported_models.py).
HOST = {"T2V": ("WAN21_T2V", 16, 16), "Wan2.2 I2V": ("WAN21_T2V", 36, 16), "TI2V-5B": ("WAN22_T2V", 48, 48), "Lucy-Edit": ("WAN22_T2V", 96, 48),
        "Wan2.1 I2V": ("WAN21_I2V", 36, 16), "Wan2.1 FLF2V": ("WAN21_I2V", 36, 16),
        "Fun Control": ("WAN21_FunControl2V", 48, 16)}


@dataclass(frozen=True)
class Tiny:
    """Folders of one seeded tiny T2V (2 heads, 2 blocks): BF16, and its real ModelOpt exports."""

    bf16: Path
    fp8: Path  # everything FP8 but proj_out and the convolution
    # as published: embedders, proj_out, first and last blocks in BF16 (docs/sources/modelopt.md, "Calibration filters")
    mixed: Path
    sharded: Path
    i2v: Path  # Wan2.1 I2V, with its image embedder FP8 too


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    root = tmp_path_factory.mktemp("wan")
    reference = wan.make()
    made = Tiny(root / "bf16", root / "fp8", root / "mixed", root / "sharded", root / "i2v")
    reference.save_pretrained(made.bf16)
    wan.export(reference, made.fp8)
    wan.export(reference, made.mixed, keep=[r".*(patch_embedding|condition_embedder|proj_out|blocks\.0\.).*"])
    wan.export(reference, made.sharded, max_shard_size="1MB")
    wan.export(wan.make(**wan.VARIANTS["Wan2.1 I2V"][0]), made.i2v, variant="Wan2.1 I2V")
    assert len(list(made.sharded.glob("*.safetensors"))) > 1
    return made


@pytest.fixture(scope="module", params=["fp8", "mixed", "sharded", "i2v"])
def folder(request, tiny):
    return getattr(tiny, request.param)


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True)


def inputs_for(folder, **kwargs):
    """Inputs that fit the variant of a folder."""
    return wan.inputs(**wan.VARIANTS["Wan2.1 I2V" if folder.name == "i2v" else "T2V"][1], **kwargs)


def diffusers_names(native) -> dict[str, str]:
    """Native name -> diffusers name, by diffusers' unmodified converter (which does not know FLF2V's positions)."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    renamed = {tag: new for new, tag in convert_wan_transformer_to_diffusers({k: k for k in native}).items()}
    return {old: "condition_embedder.image_embedder.pos_embed" if old == "img_emb.emb_pos" else new
            for old, new in renamed.items()}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_folder_equals_diffusers(variant, heads, tmp_path):
    sizes, inputs = wan.VARIANTS[variant]
    reference = wan.make(heads=heads, seed=heads, **sizes)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    config = loaded.patcher.model.model_config
    assert (type(config).__name__, config.unet_config["in_dim"], config.unet_config["out_dim"]) == HOST[variant]
    assert config.unet_config["num_heads"] == heads
    expected = wan.diffusers_velocity(reference.float(), **wan.inputs(**inputs))
    assert rel_l2(wan.comfy_velocity(loaded.patcher, **wan.inputs(**inputs)), expected) < FORWARD


def test_every_input_matters():
    """The inputs above reach the output, so that a wrong convention for one of them would show."""
    sizes, inputs = wan.VARIANTS["Wan2.1 FLF2V"]
    reference, full = wan.make(**sizes).float(), wan.inputs(**inputs)
    out = wan.diffusers_velocity(reference, **full)
    for name in ("text", "concat", "image"):
        assert rel_l2(wan.diffusers_velocity(reference, **full | {name: full[name].roll(1, -1)}), out) > 100 * FORWARD
    assert rel_l2(wan.diffusers_velocity(reference, **full | {"sigma": full["sigma"] + 0.01}), out) > 100 * FORWARD


@pytest.mark.parametrize("size", [{"frames": 1, "height": 10, "width": 14, "text": 5}, {"frames": 5, "height": 2}])
def test_odd_token_counts(size, tiny):
    inputs = wan.inputs(**size)
    expected = wan.diffusers_velocity(wan.make().float(), **inputs)
    assert rel_l2(wan.comfy_velocity(load(tiny.bf16).patcher, **inputs), expected) < FORWARD


def test_a_timestep_for_each_frame(tmp_path):
    """TI2V from an image: the given frame has timestep 0 (WanImageToVideoPipeline, WAN22.process_timestep)."""
    sizes, inputs = wan.VARIANTS["TI2V-5B"]
    reference = wan.make(**sizes)
    reference.save_pretrained(tmp_path)
    inputs = wan.inputs(**inputs) | {"frame_mask": torch.tensor([0.0, 1.0, 1.0])}
    expected = wan.diffusers_velocity(reference.float(), **inputs)
    patcher = load(tmp_path).patcher
    assert rel_l2(wan.comfy_velocity(patcher, **inputs), expected) < FORWARD
    without = wan.comfy_velocity(patcher, **inputs | {"frame_mask": None})
    assert rel_l2(without, expected) > 100 * FORWARD


def test_modules_that_diffusers_keeps_in_f32(tmp_path):
    """diffusers loads norms, modulation and the time embedder as F32 and saves them so, beside BF16."""
    from diffusers import WanTransformer3DModel

    original = wan.make().float()
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(1 + 2 ** -12)  # no longer a BF16 number
    original.save_pretrained(tmp_path / "f32")
    reference = WanTransformer3DModel.from_pretrained(tmp_path / "f32", torch_dtype=torch.bfloat16)
    reference.save_pretrained(tmp_path / "mixed")
    assert {t.dtype for t in stored(tmp_path / "mixed").values()} == {torch.float32, torch.bfloat16}
    for name in ("f32", "mixed"):
        folder = tmp_path / name
        expected = wan.diffusers_velocity(wan.emulate(stored(folder), config_of(folder)), **wan.inputs())
        assert rel_l2(wan.comfy_velocity(load(folder).patcher, **wan.inputs()), expected) < FORWARD


@pytest.mark.parametrize("variant", ["T2V", "TI2V-5B", "Wan2.1 FLF2V"])
def test_native_names(variant, tmp_path):
    """The same model as the vendor and ComfyUI name it, with and without a prefix; names are the host model's own."""
    sizes, inputs = wan.VARIANTS[variant]
    reference = wan.make(**sizes)
    reference.save_pretrained(tmp_path / "diffusers")
    tensors = stored(tmp_path / "diffusers")
    names = diffusers_names(dict(load(tmp_path / "diffusers").patcher.model.diffusion_model.named_parameters()))
    assert set(names.values()) == set(tensors)
    expected = wan.diffusers_velocity(reference.float(), **wan.inputs(**inputs))
    for prefix in ("", "model.diffusion_model."):
        named = {prefix + native: tensors[name] for native, name in names.items()}
        folder = save(tmp_path / f"p{len(prefix)}", named, None, name="wan.safetensors")
        loaded = load(folder / "wan.safetensors")
        assert loaded.description.naming == Naming("native", prefix)
        assert rel_l2(wan.comfy_velocity(loaded.patcher, **wan.inputs(**inputs)), expected) < FORWARD


@pytest.mark.parametrize("variant", ["T2V", "Wan2.1 I2V"])
@pytest.mark.parametrize("kind", ["ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel"])
def test_classes_of_wans_tensors(kind, variant, tmp_path):
    """With weights, and as a deferred base; a config that leaves sizes out has those of its own class."""
    sizes, inputs = wan.VARIANTS[variant]
    reference = wan.make(kind=kind, **sizes)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "base")
    next((tmp_path / "base").glob("*.safetensors")).unlink()
    patcher, expected = load(tmp_path / "whole").patcher, wan.diffusers_velocity(reference.float(), **wan.inputs(**inputs))
    assert type(patcher.model.model_config).__name__ == HOST[variant][0]
    assert rel_l2(wan.comfy_velocity(patcher, **wan.inputs(**inputs)), expected) < FORWARD
    base = model.defer(model.Request(str(tmp_path / "base")))
    override = model.override(base.patcher, model.Request(str(tmp_path / "whole")))
    assert rel_l2(wan.comfy_velocity(override.patcher, **wan.inputs(**inputs)), expected) < FORWARD


@pytest.mark.parametrize("skip", [8, 5])
def test_chronoedits_two_frames_are_the_hosts_with_scale_rope(skip, tmp_path):
    """diffusers places the second of two latent frames at `rope_temporal_skip_len` - 1; the host does with its node
    ScaleROPE (comfy_extras/nodes_rope.py), scale_t as many."""
    reference = wan.make(kind="ChronoEditTransformer3DModel")
    reference.rope.temporal_skip_len = skip
    reference.save_pretrained(tmp_path)
    inputs, patcher = wan.inputs(frames=2), load(tmp_path).patcher
    expected = wan.diffusers_velocity(reference.float(), **inputs)
    assert rel_l2(wan.comfy_velocity(patcher, **inputs), expected) > 100 * FORWARD
    scaled = patcher.clone()
    scaled.set_model_rope_options(1.0, 0.0, 1.0, 0.0, skip - 1.0, 0.0)
    assert rel_l2(wan.comfy_velocity(scaled, **inputs), expected) < FORWARD


def test_skyreels_with_rates_or_blocks_of_frames_is_refused(tiny, tmp_path):
    for number, said in enumerate(({"inject_sample_info": True}, {"num_frame_per_block": 5})):
        save(tmp_path / str(number), stored(tiny.bf16),
             {**config_of(tiny.bf16), "_class_name": "SkyReelsV2Transformer3DModel", **said})
        with pytest.raises(CheckpointError, match=next(iter(said))):
            load(tmp_path / str(number))


def test_a_flux_is_not_wan_and_a_wan_not_flux(tiny):
    from quantized_transformers.loaders.architectures import ARCHITECTURES

    names = list(stored(tiny.fp8))
    assert [a.name for a in ARCHITECTURES if a.naming(names)] == ["Wan"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_deferred_is_the_same_model(variant, tmp_path):
    sizes, inputs = wan.VARIANTS[variant]
    wan.make(**sizes).save_pretrained(tmp_path)
    loaded, deferred = load(tmp_path).patcher, model.defer(model.Request(str(tmp_path))).patcher
    assert type(deferred.model) is type(loaded.model)
    assert deferred.model.model_config.unet_config == loaded.model.model_config.unet_config
    shapes = [{k: v.shape for k, v in p.model.diffusion_model.named_parameters()} for p in (deferred, loaded)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in deferred.model.diffusion_model.parameters())
    description = describe(Checkpoint(locate(str(tmp_path))))
    assert WAN.dims_from_model(deferred.model.model_config.unet_config) == description.dims
    with pytest.raises(CheckpointError, match="has no weights yet"):
        wan.comfy_velocity(deferred, **wan.inputs(**inputs))


def test_dequantized_weights_are_the_stored_bytes_exactly(folder):
    actual = {name: p.dequantize() if hasattr(p, "_layout_cls") else p.float()
              for name, p in load(folder).patcher.model.diffusion_model.named_parameters() if "input_scale" not in name}
    expected, names = dequantize(stored(folder)), diffusers_names(actual)
    assert set(names.values()) == set(expected)
    wrong = [name for name in actual if not torch.equal(actual[name], expected[names[name]])]
    assert not wrong


def test_what_is_quantized_stays_quantized(folder):
    fp8 = {k.removesuffix(".weight"): t for k, t in stored(folder).items() if t.dtype == torch.float8_e4m3fn}
    loaded = load(folder)
    assert loaded.description.formats["FP8"] == len(fp8) and loaded.description.family == "modelopt-fp8"
    quantized = {name: m.weight for name, m in loaded.patcher.model.diffusion_model.named_modules()
                 if hasattr(getattr(m, "weight", None), "_qdata")}
    names = diffusers_names(f"{name}.weight" for name in quantized)
    assert {name.removesuffix(".weight") for name in names.values()} == set(fp8)
    for name, weight in quantized.items():
        codes = fp8[names[f"{name}.weight"].removesuffix(".weight")]
        assert torch.equal(weight._qdata.view(torch.uint8), codes.view(torch.uint8))


def test_emulated_forward_equals_dequantized_weights(folder):
    """The default on this CPU: FP8 in memory, full-precision matmul."""
    inputs = inputs_for(folder)
    expected = wan.diffusers_velocity(wan.emulate(dequantize(stored(folder)), config_of(folder)), **inputs)
    for compute in ("auto", "dequantize"):
        assert rel_l2(wan.comfy_velocity(load(folder, compute=compute).patcher, **inputs), expected) < FORWARD


def test_static_forward_equals_emulation(folder):
    """One activation on the other side of a rounding step moves the output by up to 8e-3: the emulation differs from
    itself by as much when its input changes by 2e-6. Where none is, both agree to 2e-7; so the best of four counts, or of
    as many more as it takes on a machine that splits its sums otherwise."""
    emulation, patcher = wan.emulate(stored(folder), config_of(folder)), load(folder, compute="native").patcher
    errors = []
    for seed in range(1, 17):
        inputs = inputs_for(folder, seed=seed)
        expected = wan.diffusers_velocity(emulation, **inputs)
        errors.append(rel_l2(wan.comfy_velocity(patcher, **inputs), expected))
        if seed >= 4 and min(errors) < EMULATED:
            break
    weight_only = rel_l2(wan.comfy_velocity(load(folder).patcher, **inputs), expected)
    assert min(errors) < EMULATED and max(errors) < weight_only
    assert weight_only > 10 * EMULATED  # the activations really were quantized


def test_every_layers_static_activations_are_the_definition(folder):
    """Layer by layer, on what the host gave each: clamp(x / input_scale, +-448) as E4M3, times the stored weight."""
    tensors = stored(folder)
    patcher = load(folder, compute="native").patcher
    network = patcher.model.diffusion_model
    names = diffusers_names(f"{name}.weight" for name, m in network.named_modules()
                            if getattr(m, "weight", None) is not None)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [network.get_submodule(native.removesuffix(".weight")).register_forward_hook(
                 lambda _module, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())}))
             for native, name in names.items() if tensors[name].dtype == torch.float8_e4m3fn]
    wan.comfy_velocity(patcher, **inputs_for(folder))
    for hook in hooks:
        hook.remove()
    assert seen.keys() == {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    weights = dequantize(tensors)
    for name, (x, out) in seen.items():
        scale = tensors[name.replace(".weight", ".input_scale")]
        expected = [torch.nn.functional.linear(q, weights[name], weights[name.replace(".weight", ".bias")])
                    for q in quantized_fp8(x.float(), scale)]
        assert min(rel_l2(out, one) for one in expected) < FORWARD, name


def test_views_up_to_the_hosts_call(folder):
    """Nothing is fused or swapped in Wan: every weight, bias and modulation is the mapped file."""
    checkpoint = Checkpoint(locate(str(folder)))
    description = describe(checkpoint)
    tensors = checkpoint.load_tensors()
    mapped = {t.data_ptr(): t.dtype for t in tensors.values()}
    native = assembled(WAN, description.dims, description.naming, tensors)
    copied = {name for name, t in native.tensors.items() if mapped.get(t.data_ptr()) != t.dtype}
    assert not {name for name in copied if not name.endswith((".comfy_quant", ".weight_scale", ".input_scale", ".weight_t0_input_scale"))}


@pytest.mark.parametrize(("which", "kind"), [("fp8", "auto"), ("mixed", "weights"), ("i2v", "component")])
def test_override_of_a_deferred_base(which, kind, tiny, tmp_path):
    folder = getattr(tiny, which)
    wan.make(**wan.VARIANTS["Wan2.1 I2V" if which == "i2v" else "T2V"][0]).save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # a deferred base needs only its config
    result = model.override(model.defer(model.Request(str(tmp_path))).patcher, model.Request(str(folder)), kind)
    expected = wan.comfy_velocity(load(folder).patcher, **inputs_for(folder))
    assert torch.equal(wan.comfy_velocity(result.patcher, **inputs_for(folder)), expected)


def test_other_models_are_refused_as_overrides(tiny, tmp_path):
    base = model.defer(model.Request(str(tiny.bf16))).patcher
    with pytest.raises(CheckpointError, match="(?s)in.*36"):
        model.override(base, model.Request(str(tiny.i2v)))
    wan.make(heads=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden"):
        model.override(base, model.Request(str(tmp_path)))


# A LoRA by the host's own LoraLoaderModelOnly, in native names (comfy/lora.py has no diffusers names for Wan).
# Native layer -> (diffusers layer, rows, columns).
TARGETS = {"blocks.0.self_attn.q": ("blocks.0.attn1.to_q", 256, 256),
           "blocks.0.cross_attn.v": ("blocks.0.attn2.to_v", 256, 256),
           "blocks.1.self_attn.o": ("blocks.1.attn1.to_out.0", 256, 256),
           "blocks.1.ffn.0": ("blocks.1.ffn.net.0.proj", 256, 256),
           "blocks.1.ffn.2": ("blocks.1.ffn.net.2", 256, 256),
           "time_projection.1": ("condition_embedder.time_proj", 1536, 256),
           "head.head": ("proj_out", 64, 256)}


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (_, out, inner) in TARGETS.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(8, inner, generator=g) * inner ** -0.5
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(out, 8, generator=g) * 8 ** -0.5
    return tensors


@pytest.fixture(scope="module")
def load_lora(lora, tmp_path_factory):
    """The host's node, on a file in a loras folder."""
    from nodes import LoraLoaderModelOnly

    folder = tmp_path_factory.mktemp("loras")
    save_file(lora, str(folder / "tiny_wan.safetensors"))
    with model_folder("loras", folder):
        yield lambda patcher: LoraLoaderModelOnly().load_lora_model_only(patcher, "tiny_wan.safetensors", 1.0)[0]


def merged(folder, lora) -> torch.Tensor:
    """diffusers' forward with the LoRA merged into the weights by its definition, W + B A, in F32."""
    tensors = dequantize(stored(folder))
    for native, (name, _, _) in TARGETS.items():
        a, b = (lora[f"diffusion_model.{native}.lora_{x}.weight"] for x in "AB")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + b @ a
    return wan.diffusers_velocity(wan.emulate(tensors, config_of(folder)), **wan.inputs())


def full(patcher):
    return wan.comfy_velocity(patcher, **wan.inputs())


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: wan.comfy_velocity(p, load=False, **wan.inputs()))


@pytest.mark.parametrize("mode", [full, low_vram])
@pytest.mark.parametrize("which", ["fp8", "mixed"])
def test_a_lora_has_the_effect_it_has_on_bf16(mode, which, tiny, load_lora):
    base, fp8 = load(tiny.bf16).patcher, load(getattr(tiny, which)).patcher
    effect = full(load_lora(base)) - full(base)
    before = mode(fp8)
    quantized = mode(load_lora(fp8)) - before
    assert effect.norm() > 0.3 * full(base).norm()  # large against rounding
    assert abs(float(quantized.norm() / effect.norm()) - 1) < 0.05
    cosine = float((quantized.double() * effect.double()).sum() / (quantized.double().norm() * effect.double().norm()))
    assert cosine > 0.99
    assert torch.equal(mode(fp8), before)  # and it can be taken off again


@pytest.mark.parametrize("which", ["bf16", "fp8", "mixed"])
def test_a_lora_is_the_definition(which, tiny, lora, load_lora):
    """Patched when the layer runs there is no requantization: exactly W_dequantized + B A."""
    folder = getattr(tiny, which)
    patched = load_lora(load(folder).patcher)
    assert rel_l2(low_vram(patched), merged(folder, lora)) < FORWARD
    if which == "bf16":
        assert rel_l2(full(patched), merged(folder, lora)) < FORWARD


def test_a_lora_before_the_override(tiny, load_lora):
    """On a deferred base, too: the patch moves to the override's weights."""
    early = model.override(load_lora(model.defer(model.Request(str(tiny.bf16))).patcher), model.Request(str(tiny.fp8)))
    assert torch.equal(low_vram(early.patcher), low_vram(load_lora(load(tiny.fp8).patcher)))

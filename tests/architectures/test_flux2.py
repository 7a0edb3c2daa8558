"""FLUX.2 against diffusers: names, bytes, forwards, LoRAs and overrides. ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.flux2 import FLUX2
from quantized_transformers.loaders.errors import CheckpointError
from support import common, flux, flux2
from support import lora as lora_tools
from support.common import assembled

pytestmark = pytest.mark.parity

# fp32 forwards of the same network in two implementations: 3e-7 .. 4e-7 were measured (docs/limits.md).
FORWARD = 1e-5
# One Linear on the same quantized input.
LAYER = 1e-5
# FP8 activations: two implementations agree until one value falls on the other side of a rounding step, which every
# block behind it multiplies (measured: 2e-7 for most inputs, 6e-3 for the others). A wrong scale differs for all inputs.
EMULATED = 1e-3


@dataclass(frozen=True)
class Tiny:
    """Folders of one seeded tiny FLUX.2 (2 heads, 2 + 2 blocks)."""

    bf16: Path
    fp8: Path  # everything FP8 but proj_out, each of q, k, v with its own scale
    mixed: Path  # embedders, modulation and the text's attention left in BF16, as the published NVFP4 file has it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    root = tmp_path_factory.mktemp("flux2")
    made = Tiny(root / "bf16", root / "fp8", root / "mixed")
    source = flux2.make()
    source.save_pretrained(made.bf16)
    flux2.export(source, made.fp8)
    flux2.export(source, made.mixed, keep=flux2.FALLBACK)
    return made


@pytest.fixture(scope="module", params=["fp8", "mixed"])
def folder(request, tiny) -> Path:
    return getattr(tiny, request.param)


@pytest.fixture(scope="module")
def rows(tiny) -> flux2.Rows:
    """Where the stored rows belong, from the model ComfyUI builds and diffusers' converter."""
    import comfy.sd

    # the host makes a native model of this size when it is given one; only shapes are used
    tags = {"img_in.weight": (256, 128), "txt_in.weight": (256, 96), "final_layer.linear.weight": (128, 256),
            "guidance_in.in_layer.weight": (256, 256), "double_stream_modulation_img.lin.weight": (1536, 256),
            "double_blocks.0.img_attn.norm.key_norm.weight": (128,), "double_blocks.1.img_mlp.0.weight": (1536, 256),
            "single_blocks.0.linear1.weight": (2304, 256), "single_blocks.1.linear1.weight": (2304, 256)}
    patcher = comfy.sd.load_diffusion_model_state_dict({name: torch.zeros(shape) for name, shape in tags.items()})
    return flux2.Rows(flux2.host_shapes(patcher), flux2.convert)


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True)


def run(patcher):
    return flux2.comfy_velocity(patcher, **flux2.inputs())


REAL = {"dev": {}, "klein 4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
                                "guidance_embeds": False},
        "klein 9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
                     "guidance_embeds": False}}


@pytest.mark.parametrize("variant", REAL)
def test_real_sizes_have_the_names_and_shapes_of_both_sides(variant, tmp_path):
    """As published, without memory: diffusers, the host and our table agree on it all."""
    from diffusers import Flux2Transformer2DModel

    flux.same_at_real_size(Flux2Transformer2DModel, FLUX2, REAL[variant], "Flux2", tmp_path)


@pytest.mark.parametrize("guidance", [True, False])  # dev and klein
def test_pictures_to_edit(guidance, tmp_path):
    """Each further picture is ten later in time, as Flux2Pipeline has it."""
    reference = flux2.make(heads=1, guidance=guidance)
    reference.save_pretrained(tmp_path)
    given, pictures = flux2.inputs(batch=1), [torch.randn(1, 128, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    texts = given["text"].shape[1]
    ids = [torch.cartesian_prod(torch.tensor([10 * at]), *map(torch.arange, one.shape[2:]), torch.arange(1)).float()
           for at, one in enumerate((given["x"], *pictures))]
    places = torch.zeros(texts, 4)
    places[:, 3] = torch.arange(texts)
    with torch.no_grad():
        out = reference.float()(
            hidden_states=torch.cat([one.flatten(2).transpose(1, 2) for one in (given["x"], *pictures)], 1),
            timestep=given["sigma"], img_ids=torch.cat(ids), guidance=given["guidance"] if guidance else None,
            encoder_hidden_states=given["text"], txt_ids=places, return_dict=False)[0]
    expected = out[:, :len(ids[0])].transpose(1, 2).reshape(given["x"].shape)
    found = common.apply_model(load(tmp_path).patcher, given["x"], given["sigma"], c_crossattn=given["text"],
                               guidance=given["guidance"], ref_latents=pictures)
    assert common.rel_l2(found, expected) < FORWARD


@pytest.mark.parametrize(("heads", "guidance"), [(1, True), (2, True), (2, False)])
def test_bf16_folder_equals_diffusers(heads, guidance, tmp_path):
    reference = flux2.make(heads=heads, guidance=guidance, seed=heads)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == "Flux2"
    assert loaded.description.dims["guidance"] == guidance
    expected = flux2.diffusers_velocity(reference.float(), **flux2.inputs())
    assert common.rel_l2(run(loaded.patcher), expected) < FORWARD


def test_odd_token_counts(tiny):
    inputs = flux2.inputs(height=5, width=7, text=5)
    expected = flux2.diffusers_velocity(flux2.make().float(), **inputs)
    assert common.rel_l2(flux2.comfy_velocity(load(tiny.bf16).patcher, **inputs), expected) < FORWARD


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("leaf", ["scale", "weight"])
def test_native_names(prefix, leaf, tiny, rows, tmp_path):
    """The same model as the vendor names it (or ComfyUI: norms end in "weight")."""
    native = rows.to_native(common.stored(tiny.bf16))
    named = {prefix + name.replace("_norm.weight", f"_norm.{leaf}"): value for name, value in native.items()}
    loaded = load(common.save(tmp_path, named, None, name="flux2.safetensors") / "flux2.safetensors")
    assert loaded.description.naming == Naming("native", prefix, leaf)
    expected = flux2.diffusers_velocity(flux2.make().float(), **flux2.inputs())
    assert common.rel_l2(run(loaded.patcher), expected) < FORWARD


@pytest.mark.parametrize("guidance", [True, False])
def test_name_map_is_the_inverse_of_diffusers_converter(guidance):
    """Every row of a full-width native model carries a tag; diffusers' converter, then ours, is identity."""
    from diffusers import Flux2Transformer2DModel

    dims = {"hidden": 6144, "in": 128, "out": 128, "text": 15360, "double": 2, "single": 3, "guidance": int(guidance)}
    native: dict[str, torch.Tensor] = {}
    count = 0
    for module in FLUX2.modules(dims, Naming("native")):
        assert not module.bias
        tags = torch.arange(count, count := count + sum(module.rows))
        native[f"{module.native}.{module.leaf}"] = tags if not module.inner else tags[:, None]
    diffusers = flux2.convert(native)
    with torch.device("meta"):
        reference = Flux2Transformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=guidance).state_dict()
    assert {name: t.shape[0] for name, t in diffusers.items()} == {name: t.shape[0] for name, t in reference.items()}
    back = assembled(FLUX2, dims, Naming("diffusers"), dict(diffusers)).tensors
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


def test_dequantized_weights_are_the_stored_bytes_exactly(folder, rows):
    loaded = load(folder)
    actual = {name: p.dequantize() if hasattr(p, "_layout_cls") else p.float()
              for name, p in loaded.patcher.model.diffusion_model.named_parameters() if "input_scale" not in name}
    expected = rows.to_native(common.dequantize(common.stored(folder)))
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong


def test_what_is_quantized_stays_quantized(folder, tiny):
    tensors = common.stored(folder)
    codes = {name: t.numel() for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    loaded = load(folder)
    assert loaded.description.formats["FP8"] == len(codes) and loaded.description.family == "modelopt-fp8"
    quantized = [m for m in loaded.patcher.model.diffusion_model.modules()
                 if hasattr(getattr(m, "weight", None), "_qdata")]
    # 2 double blocks: q, k, v of the quantized streams become one module each
    assert len(quantized) == len(codes) - 2 * 2 * (2 if folder == tiny.fp8 else 1)
    inner = [t for m in quantized for t in m.weight.layout_cls.get_plain_tensors(m.weight)]
    assert sum(t.numel() for t in inner if t.dtype == torch.float8_e4m3fn) == sum(codes.values())


def test_emulated_forward_equals_dequantized_weights(folder):
    """The default on this CPU: FP8 in memory, full-precision matmul."""
    dequantized = flux2.emulate(common.dequantize(common.stored(folder)), common.config_of(folder))
    expected = flux2.diffusers_velocity(dequantized, **flux2.inputs())
    for compute in ("auto", "dequantize"):
        assert common.rel_l2(run(load(folder, compute=compute).patcher), expected) < FORWARD


def test_static_layers_are_the_definition(folder, rows):
    """In a forward with FP8 activations every quantized layer computes q(x) W, to fp32 rounding."""
    errors = flux2.layer_errors(load(folder, compute="native").patcher, run, rows, common.stored(folder))
    assert {name: error for name, error in errors.items() if not error < LAYER} == {}


def test_static_forward_equals_emulation(folder):
    emulated = flux2.emulate(common.stored(folder), common.config_of(folder))
    native, plain = load(folder, compute="native").patcher, load(folder).patcher
    errors, effects = [], []
    for seed in (1, 2, 3):
        inputs = flux2.inputs(seed=seed)
        expected = flux2.diffusers_velocity(emulated, **inputs)
        errors.append(common.rel_l2(flux2.comfy_velocity(native, **inputs), expected))
        effects.append(common.rel_l2(flux2.comfy_velocity(plain, **inputs), expected))
    assert min(errors) < EMULATED and max(errors) < 0.5 * min(effects), errors
    assert min(effects) > 10 * EMULATED  # the activations really were quantized


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory) -> Path:
    return flux2.export(flux2.make(), tmp_path_factory.mktemp("nvfp4") / "full", "NVFP4")


def test_nvfp4_forward_equals_dequantized_weights(nvfp4):
    loaded = load(nvfp4)
    assert loaded.description.formats == {"NVFP4": 38, "BF16": 1}
    dequantized = flux2.emulate(common.dequantize(common.stored(nvfp4)), common.config_of(nvfp4))
    assert common.rel_l2(run(loaded.patcher), flux2.diffusers_velocity(dequantized, **flux2.inputs())) < FORWARD


def test_nvfp4_as_the_vendor_publishes_it(rows, tmp_path):
    """FLUX.2-dev-NVFP4: native names, packed q, k, v, ComfyUI's byte order, no marker, no declaration."""
    folder = flux2.export(flux2.make(), tmp_path / "export", "NVFP4", keep=flux2.FALLBACK)
    tensors = common.stored(folder)
    parts: dict[str, dict[int, str]] = {}
    for name, (target, places) in rows.places.items():
        parts.setdefault(target, {})[int(places[0])] = name.removesuffix(".weight")
    file = {}
    for name, value in rows.to_native(common.dequantize(tensors)).items():
        layers = [layer for _, layer in sorted(parts[name].items())]
        if f"{layers[0]}.weight_scale_2" not in tensors:
            file[name.replace("_norm.weight", "_norm.scale")] = value.to(torch.bfloat16)
            continue
        for leaf in ("weight", "weight_scale"):
            file[f"{name.removesuffix('.weight')}.{leaf}"] = torch.cat([tensors[f"{layer}.{leaf}"] for layer in layers])
        for leaf in ("weight_scale_2", "input_scale"):
            (one,) = {float(tensors[f"{layer}.{leaf}"]) for layer in layers}  # modelopt unified q, k and v
            file[f"{name.removesuffix('.weight')}.{leaf}"] = torch.tensor(one)
    saved = common.save(tmp_path / "file", common.comfy_order(file), None, name="flux2-nvfp4.safetensors")
    loaded = load(saved / "flux2-nvfp4.safetensors")
    assert loaded.description.naming.style == "native" and loaded.description.formats["NVFP4"] == 2 * 6 + 2 * 2
    dequantized = flux2.emulate(common.dequantize(tensors), common.config_of(folder))
    assert common.rel_l2(run(loaded.patcher), flux2.diffusers_velocity(dequantized, **flux2.inputs())) < FORWARD


@pytest.mark.parametrize("which", ["bf16", "fp8", "mixed"])
def test_views_up_to_the_hosts_call(which, tiny):
    """Only BF16 q, k, v and the swapped modulation are copies; the rest is the mapped file."""
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate

    checkpoint = Checkpoint(locate(str(getattr(tiny, which))))
    description = describe(checkpoint)
    stored = checkpoint.load_tensors()
    kept = list(stored.values())
    mapped = {t.data_ptr() for t in kept}
    native = assembled(FLUX2, description.dims, description.naming, stored)
    copied = {name for name, t in native.tensors.items() if t.data_ptr() not in mapped
              and not name.endswith((".comfy_quant", ".weight_scale", ".input_scale", ".weight_t0_input_scale"))}
    streams = {"bf16": ("img", "txt"), "fp8": (), "mixed": ("txt",)}[which]
    assert copied == {"final_layer.adaLN_modulation.1.weight",
                      *(f"double_blocks.{i}.{stream}_attn.qkv.weight" for i in range(2) for stream in streams)}


@pytest.mark.parametrize("guidance", [True, False])
def test_deferred(guidance, tiny, rows, tmp_path):
    """Without weight files: every parameter that the host's model has, and no memory."""
    flux2.make(guidance=guidance).save_config(tmp_path)
    patcher = model.defer(model.Request(str(tmp_path))).patcher
    shapes = {name: shape for name, shape in rows.shapes.items() if guidance or not name.startswith("guidance_in.")}
    assert flux2.host_shapes(patcher) == shapes
    assert all(p.is_meta for p in patcher.model.diffusion_model.parameters())


@pytest.mark.parametrize("kind", ["component", "weights"])
def test_override_of_a_deferred_base(kind, tiny):
    deferred = model.defer(model.Request(str(tiny.bf16))).patcher
    assert torch.equal(run(model.override(deferred, model.Request(str(tiny.fp8)), kind).patcher),
                       run(load(tiny.fp8).patcher))


def test_override_of_another_model(tiny, tmp_path):
    flux2.make(guidance=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="guidance"):
        model.override(model.defer(model.Request(str(tiny.bf16))).patcher, model.Request(str(tmp_path)))


def test_saved_by_the_host_and_loaded_again(tiny, tmp_path):
    import comfy.sd

    patcher = load(tiny.fp8).patcher
    expected = run(patcher)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patcher)
    again = load(tmp_path / "saved.safetensors")
    assert again.description.naming.style == "native"
    assert torch.equal(run(again.patcher), expected)


CONFIGS = {"attention_head_dim": 64, "axes_dims_rope": [16, 56, 56], "mlp_ratio": 4.0, "patch_size": 2, "in_channels": 64,
           "out_channels": 64, "rope_theta": 10000, "timestep_guidance_channels": 128, "num_layers": "8"}


@pytest.mark.parametrize("key", CONFIGS)
def test_config_that_the_host_cannot_run(key, tiny):
    config = common.config_of(tiny.bf16)
    assert FLUX2.dims_from_config(config)["hidden"] == 256
    with pytest.raises(ValueError, match=key):
        FLUX2.dims_from_config({**config, key: CONFIGS[key]})


def test_names_of_other_models(tiny, rows):
    diffusers, native = set(common.stored(tiny.bf16)), set(rows.shapes)
    assert FLUX2.naming(diffusers) == Naming("diffusers") and FLUX2.naming(native) == Naming("native")
    for names in (diffusers, native):
        assert FLUX2.naming({n for n in names if "stream_modulation" not in n}) is None
        for more in ("controlnet_x_embedder.weight", "distilled_guidance_layer.in_proj.weight",
                     "transformer_blocks.0.attn.qkv_proj.qweight"):
            assert FLUX2.naming({*names, more}) is None
        assert FLUX2.naming({n.replace(".weight", ".lora_A.weight") for n in names}) is None


# By the host's tables: native names, and diffusers' (PEFT) names of split and single layers.
LORA = {"diffusion_model.double_blocks.0.img_attn.qkv": (768, 256), "diffusion_model.single_blocks.1.linear1": (2304, 256),
        "diffusion_model.final_layer.linear": (128, 256), "diffusion_model.double_blocks.1.txt_mlp.2": (256, 768),
        "transformer.transformer_blocks.1.attn.to_q": (256, 256),
        "transformer.transformer_blocks.1.attn.add_v_proj": (256, 256),
        "transformer.single_transformer_blocks.0.attn.to_out": (256, 1024)}


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (out, inner) in LORA.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, inner, generator=g) * inner ** -0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 8, generator=g) * 8 ** -0.5
    return tensors


@pytest.fixture(scope="module")
def load_lora(lora, tmp_path_factory):
    """The host's node, on a file in a loras folder."""
    from nodes import LoraLoaderModelOnly

    folder = tmp_path_factory.mktemp("loras")
    save_file(lora, str(folder / "tiny-flux2.safetensors"))

    def load_lora(patcher):
        patched = LoraLoaderModelOnly().load_lora_model_only(patcher, "tiny-flux2.safetensors", 1.0)[0]
        assert sum(map(len, patched.patches.values())) == len(LORA)
        return patched

    with common.model_folder("loras", folder):
        yield load_lora


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: flux2.comfy_velocity(p, load=False, **flux2.inputs()))


def merged(folder, lora, rows) -> torch.Tensor:
    """diffusers' forward with the LoRA merged into the weights by its definition, W + B A, in F32."""
    tensors = common.dequantize(common.stored(folder))
    delta = {name: lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"] for name in LORA}
    native = {f"{name.removeprefix('diffusion_model.')}.weight": value for name, value in delta.items()}
    changed = 0
    for name in tensors:
        for add in (rows.to_stored(name, native), delta.get(f"transformer.{name.removesuffix('.weight')}")):
            if add is not None:
                tensors[name] = tensors[name] + add
                changed += 1
    assert changed == len(LORA) + 2  # q, k and v
    return flux2.diffusers_velocity(flux2.emulate(tensors, common.config_of(folder)), **flux2.inputs())


@pytest.mark.parametrize("mode", [run, low_vram])
def test_lora_has_the_effect_it_has_on_bf16(mode, folder, tiny, load_lora):
    base, fp8 = load(tiny.bf16).patcher, load(folder).patcher
    effect = run(load_lora(base)) - run(base)
    before = mode(fp8)
    quantized = mode(load_lora(fp8)) - before
    assert effect.norm() > 0.3 * run(base).norm()  # large against rounding
    assert abs(float(quantized.norm() / effect.norm()) - 1) < 0.05
    assert torch.nn.functional.cosine_similarity(quantized.double().flatten(), effect.double().flatten(), 0) > 0.98
    assert torch.equal(mode(fp8), before)  # and it can be taken off again


@pytest.mark.parametrize(("which", "mode"), [("bf16", run), ("fp8", low_vram), ("mixed", low_vram)])
def test_lora_is_the_definition(which, mode, tiny, lora, load_lora, rows):
    """On BF16, and on FP8 patched when the layer runs: exactly W_dequantized + B A, without requantization."""
    folder = getattr(tiny, which)
    assert common.rel_l2(mode(load_lora(load(folder).patcher)), merged(folder, lora, rows)) < FORWARD

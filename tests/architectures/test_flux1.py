"""FLUX.1 against diffusers: names, bytes and forwards. ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.flux1 import FLUX1
from support import flux
from support.common import assembled

pytestmark = pytest.mark.parity

# fp32 forwards of the same network in two implementations: 3e-7 .. 4e-7 were measured (docs/limits.md).
FORWARD = 1e-5


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True)


@pytest.mark.parametrize(("heads", "guidance"), [(1, True), (2, True), (2, False)])
def test_bf16_folder_equals_diffusers(heads, guidance, tmp_path):
    reference = flux.make(heads=heads, guidance=guidance, seed=heads)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == ("Flux" if guidance else "FluxSchnell")
    expected = flux.diffusers_velocity(reference.float(), **flux.inputs())
    assert flux.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected) < FORWARD


def tokens(x):
    """[B, C, H, W] -> tokens of 2 x 2, and (0, y, x) of each."""
    b, c, h, w = x.shape
    ids = torch.cartesian_prod(torch.arange(1.), torch.arange(h // 2.), torch.arange(w // 2.))
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4), ids


# What a variant is given: beside the latents of every token, or as tokens of their own; channels of one; ComfyUI's class.
VARIANTS = {"Fill": (80, False, 384, "FluxInpaint"), "Canny and Depth": (16, False, 128, "Flux"), "Kontext": (16, True, 64, "Flux")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_are_given_pictures(variant, tmp_path):
    beside, apart, channels, kind = VARIANTS[variant]
    reference = flux.make(heads=1, channels=channels)
    reference.save_pretrained(tmp_path)
    given = flux.inputs(batch=1)
    height, width = (6, 4) if apart else (8, 10)
    image = torch.randn(1, beside, height, width, generator=torch.Generator().manual_seed(5))
    x, ids = tokens(given["x"] if apart else torch.cat([given["x"], image], 1))
    if apart:
        more, places = tokens(image)
        x, ids = torch.cat([x, more], 1), torch.cat([ids, places + torch.tensor([1., 0, 0])])
    with torch.no_grad():
        out = reference.float()(hidden_states=x, timestep=given["sigma"], img_ids=ids, guidance=given["guidance"],
                                pooled_projections=given["pooled"], encoder_hidden_states=given["text"],
                                txt_ids=torch.zeros(7, 3), return_dict=False)[0][:, :20]
    expected = out.view(1, 4, 5, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 8, 10)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == kind
    conds = {"ref_latents": [image]} if apart else {"c_concat": image}
    found = flux.apply_model(loaded.patcher, given["x"], given["sigma"], c_crossattn=given["text"], y=given["pooled"],
                             guidance=given["guidance"], **conds)
    assert flux.rel_l2(found, expected) < FORWARD


REAL = {"dev, Krea, Kontext": ({"guidance_embeds": True}, "Flux"), "schnell": ({}, "FluxSchnell"),
        "Fill": ({"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, "FluxInpaint"),
        "Canny, Depth": ({"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, "Flux")}


@pytest.mark.parametrize("variant", REAL)
def test_real_sizes_have_the_names_and_shapes_of_both_sides(variant, tmp_path):
    """As published, without memory: diffusers, the host and our table agree on it all."""
    from diffusers import FluxTransformer2DModel

    options, kind = REAL[variant]
    flux.same_at_real_size(FluxTransformer2DModel, FLUX1, options, kind, tmp_path)


def test_odd_token_counts(tiny):
    inputs = flux.inputs(height=10, width=14, text=5)
    expected = flux.diffusers_velocity(flux.make().float(), **inputs)
    assert flux.rel_l2(flux.comfy_velocity(load(tiny.bf16).patcher, **inputs), expected) < FORWARD


def test_native_names(tiny, tmp_path):
    """The same model as the vendor names it (written by ComfyUI's own converter), with and without a prefix."""
    import comfy.model_detection

    tensors = flux.stored(tiny.bf16)
    native = comfy.model_detection.convert_diffusers_mmdit(dict(tensors))
    expected = flux.diffusers_velocity(flux.make().float(), **flux.inputs())
    for prefix in ("", "model.diffusion_model."):
        named = {prefix + k.replace("_norm.weight", "_norm.scale"): v for k, v in native.items()}
        folder = flux.save(tmp_path / f"p{len(prefix)}", named, None, name="flux.safetensors")
        loaded = load(folder / "flux.safetensors")
        assert loaded.description.naming == Naming("native", prefix, "scale")
        assert flux.rel_l2(flux.comfy_velocity(loaded.patcher, **flux.inputs()), expected) < FORWARD


@pytest.mark.parametrize("guidance", [True, False])
def test_name_map_is_the_inverse_of_diffusers_converter(guidance):
    """Every row of a full-width native model carries a tag; diffusers' unmodified converter, then ours, is identity."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    dims = {"hidden": 3072, "in": 64, "out": 64, "text": 4096, "pooled": 768, "double": 2, "single": 3,
            "guidance": int(guidance)}
    native: dict[str, torch.Tensor] = {}
    count = 0
    for module in FLUX1.modules(dims, Naming("native")):
        for leaf in (module.leaf, "bias") if module.bias else (module.leaf,):
            rows = sum(module.rows)
            tags = torch.arange(count, count + rows)
            native[f"{module.native}.{leaf}"] = tags if leaf != "weight" else tags[:, None]
            count += rows
    diffusers = convert_flux_transformer_checkpoint_to_diffusers(dict(native))
    back = assembled(FLUX1, dims, Naming("diffusers"), dict(diffusers)).tensors
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


@pytest.fixture(scope="module", params=["fp8", "mixed", "sharded"])
def folder(request, tiny):
    return getattr(tiny, request.param)


def expected_weights(folder) -> dict[str, torch.Tensor]:
    """Native weights in F32: stored bytes by definition, renamed and fused by ComfyUI's own table, ends swapped."""
    import comfy.utils

    values = flux.dequantize(flux.stored(folder))
    table = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 256})
    native: dict[str, dict[int, torch.Tensor]] = {}
    for stored, value in values.items():
        target = table[stored]
        if isinstance(target, str):
            native[target] = {0: value}
        elif target[1] is None:
            native[target[0]] = {0: target[2](value)}
        else:
            native.setdefault(target[0], {})[target[1][1]] = value
    return {name: torch.cat([rows[k] for k in sorted(rows)]) for name, rows in native.items()}


def test_dequantized_weights_are_the_stored_bytes_exactly(folder):
    loaded = load(folder)
    actual = {name: p.dequantize() if hasattr(p, "_layout_cls") else p.float()
              for name, p in loaded.patcher.model.diffusion_model.named_parameters() if "input_scale" not in name}
    expected = expected_weights(folder)
    assert actual.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not wrong


def test_what_is_quantized_stays_quantized(folder):
    tensors = flux.stored(folder)
    fp8 = sum(t.dtype == torch.float8_e4m3fn for t in tensors.values())
    loaded = load(folder)
    assert loaded.description.formats["FP8"] == fp8 and loaded.description.family == "modelopt-fp8"
    quantized = [m for m in loaded.patcher.model.diffusion_model.modules()
                 if hasattr(getattr(m, "weight", None), "_qdata")]
    # 2 + 2 blocks: q, k, v of two streams, and q, k, v, mlp, become one module each
    assert len(quantized) == fp8 - 2 * 2 * 2 - 2 * 3
    stored_bytes = sum(t.numel() for t in tensors.values() if t.dtype == torch.float8_e4m3fn)
    inner = [t for m in quantized for t in m.weight.layout_cls.get_plain_tensors(m.weight)]
    assert sum(t.numel() for t in inner if t.dtype == torch.float8_e4m3fn) == stored_bytes


def test_emulated_forward_equals_dequantized_weights(folder):
    """The default on this CPU: FP8 in memory, full-precision matmul."""
    config = flux.config_of(folder)
    expected = flux.diffusers_velocity(flux.emulate(flux.dequantize(flux.stored(folder)), config), **flux.inputs())
    for compute in ("auto", "dequantize"):
        actual = flux.comfy_velocity(load(folder, compute=compute).patcher, **flux.inputs())
        assert flux.rel_l2(actual, expected) < FORWARD


def test_static_forward_equals_emulation(folder):
    emulated = flux.emulate(flux.stored(folder), flux.config_of(folder))
    assert flux.agrees(load(folder, compute="native").patcher, emulated)
    assert not flux.agrees(load(folder).patcher, emulated)  # weights only: the activations really are quantized above


def without_input_scales(tiny):
    return {k: v for k, v in flux.stored(tiny.fp8).items() if not k.endswith("input_scale")}


def test_dynamic_forward_equals_emulation(tiny, tmp_path):
    tensors, config = without_input_scales(tiny), flux.config_of(tiny.fp8)
    loaded = load(flux.save(tmp_path, tensors, config), compute="native")
    assert "dynamic" in loaded.report
    assert flux.agrees(loaded.patcher, flux.emulate(tensors, config, dynamic=True))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("form", ["component", "file with metadata"])
def test_generic_fp8(scheme, form, tiny, tmp_path):
    """`fp8` as SGLang and vLLM declare it; scales of shape [1], as its converter writes them."""
    import json

    tensors = flux.stored(tiny.fp8) if scheme == "static" else without_input_scales(tiny)
    tensors = {k: v.reshape(1) if k.endswith("_scale") else v for k, v in tensors.items()}
    declared = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["proj_out"]}
    config = {**flux.config_of(tiny.fp8), "quantization_config": declared}
    if form == "component":
        reference = flux.save(tmp_path, tensors, config)
    else:
        flux.save(tmp_path, tensors, None, {"quantization_config": json.dumps(declared)}, "fp8.safetensors")
        reference = tmp_path / "fp8.safetensors"
    loaded = load(reference, compute="native")
    assert loaded.description.family == "fp8" and not loaded.description.problems
    emulated = flux.emulate({k: v.reshape(()) if k.endswith("_scale") else v for k, v in tensors.items()}, config,
                            dynamic=scheme == "dynamic")
    assert flux.agrees(loaded.patcher, emulated)


@pytest.mark.parametrize("listed", ["", "model.diffusion_model."])
def test_full_precision_asked_for_in_the_header(listed, tiny, tmp_path):
    """ComfyUI's list of layers may ask for full-precision matmul of some: their activations stay as they are. With the
    prefix of ComfyUI's checkpoints or without."""
    import json

    tensors, config = flux.stored(tiny.fp8), flux.config_of(tiny.fp8)
    del config["quantization_config"]
    layers = {name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in tensors if "weight_scale" in name}
    kept = tuple(name for name in layers if ".attn." in name)
    layers |= {name: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True} for name in kept}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {
        listed + name: conf for name, conf in layers.items()}})}
    loaded = load(flux.save(tmp_path, tensors, config, metadata), compute="native")
    # proj_mlp shares its fused module with q, k, v, so it is multiplied as they are
    shared = tuple(name for name in layers if name.endswith("proj_mlp"))
    assert flux.agrees(loaded.patcher, flux.emulate(tensors, config, weight_only=kept + shared))
    assert not flux.agrees(loaded.patcher, flux.emulate(tensors, config))


@pytest.mark.parametrize("listed", ["", "model.diffusion_model."])
@pytest.mark.parametrize("stored", ["", "model.diffusion_model."])
def test_full_precision_in_the_header_of_a_native_file(stored, listed, tiny, tmp_path):
    """The same whether the tensors carry the prefix of ComfyUI's checkpoints, the list of layers does, both or none."""
    import json

    layer, other = "double_blocks.0.img_attn.proj", "double_blocks.1.img_attn.proj"
    native = {name: t.bfloat16() for name, t in load(tiny.bf16).patcher.model.diffusion_model.state_dict().items()}
    for name in (layer, other):
        scale = native[f"{name}.weight"].float().abs().amax() / 448
        native |= {f"{name}.weight": (native[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn),
                   f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.05)}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {
        listed + layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}})}
    flux.save(tmp_path, {stored + name: t for name, t in native.items()}, None, metadata, "native.safetensors")
    loaded = load(tmp_path / "native.safetensors", compute="native")
    assert loaded.description.full_precision == [stored + layer]
    modules = loaded.patcher.model.diffusion_model.get_submodule
    assert modules(layer)._full_precision_mm_config and not modules(other)._full_precision_mm_config


def test_as_sglangs_converter_writes_it(tiny, tmp_path):
    """Scales of shape [1], quant_type added, and the whole declaration repeated in the header under both keys."""
    import json

    tensors = {k: v.reshape(1) if k.endswith("_scale") else v for k, v in flux.stored(tiny.mixed).items()}
    config = flux.config_of(tiny.mixed)
    config["quantization_config"]["quant_type"] = "FP8"
    declared = json.dumps(config["quantization_config"])
    metadata = {"quantization_config": declared, "_quantization_metadata": declared, "_class_name": config["_class_name"],
                "config": json.dumps(config), "format": "pt"}
    loaded = load(flux.save(tmp_path, tensors, config, metadata))
    assert loaded.description.family == "modelopt-fp8" and len(loaded.description.declared_in) == 3
    assert torch.equal(flux.comfy_velocity(loaded.patcher, **flux.inputs()),
                       flux.comfy_velocity(load(tiny.mixed).patcher, **flux.inputs()))


def test_native_fp8_file_with_comfy_markers(tiny, tmp_path):
    """A file as ComfyUI itself saves quantized models: native names, one scale a fused layer, markers."""
    import json

    fused = {"double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"}
    tensors = {}
    for name, value in expected_weights(tiny.bf16).items():
        layer = name.removesuffix(".weight")
        name = name.replace("_norm.weight", "_norm.scale")
        if layer not in fused:
            tensors[name] = value.to(torch.bfloat16)
            continue
        scale = value.abs().max() / 448
        tensors |= {name: (value / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale, f"{layer}.comfy_quant":
                    torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)}
    folder = flux.save(tmp_path, tensors, None, name="native.safetensors")
    loaded = load(folder)
    assert loaded.description.naming.style == "native" and loaded.description.formats["FP8"] == 2
    for layer in fused:
        module = loaded.patcher.get_model_object(f"diffusion_model.{layer}")
        exact = tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scale"]
        assert torch.equal(module.weight.dequantize(), exact)


def test_views_up_to_the_hosts_call(folder):
    """Of a real export only the BF16 fused tensors and the swapped modulation are copies; the rest is the mapped file."""
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate

    checkpoint = Checkpoint(locate(str(folder)))
    description = describe(checkpoint)
    stored = checkpoint.load_tensors()
    mapped = {t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size() for t in stored.values()}
    native = assembled(FLUX1, description.dims, description.naming, stored)
    copied = {name: t for name, t in native.tensors.items() if t.data_ptr() not in mapped
              and not name.endswith((".comfy_quant", ".weight_scale", ".input_scale", ".weight_t0_input_scale", ".bias"))}
    assert set(copied) == {"final_layer.adaLN_modulation.1.weight"}


def test_dtype_choice(tiny):
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        plain = load(tiny.bf16, dtype=dtype).patcher
        assert plain.model_dtype() == expected
        quantized = load(tiny.fp8, dtype=dtype).patcher
        assert quantized.object_patches["manual_cast_dtype"] == expected
        out = flux.comfy_velocity(quantized, **flux.inputs())
        reference = flux.comfy_velocity(load(tiny.fp8).patcher, **flux.inputs())
        # half precision: errors of 2^-8 a layer, a few layers
        assert flux.rel_l2(out, reference) < (1e-6 if dtype == "fp32" else 0.05)

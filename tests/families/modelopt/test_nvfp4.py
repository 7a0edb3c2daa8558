"""NVFP4 on FLUX.1: real ModelOpt exports and every byte order, against a decoder written from the format's definition."""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.codecs.nvfp4 import NVFP4_FORMAT
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.layouts.tiled import tiles_of
from quantized_transformers.quant.stored import ByteOrder
from support import flux
from support.common import comfy_order, decode_nvfp4, fake_nvfp4, swizzle

pytestmark = pytest.mark.parity

# What ComfyUI's detection reads the width of is dequantized, so its activations stay as they are.
DETECTED = ("x_embedder", "context_embedder", "time_text_embed.text_embedder.linear_1")
FORWARD = 1e-5


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True)


def run(loaded):
    return flux.comfy_velocity(loaded.patcher, **flux.inputs())


def reference(tensors, config, **options):
    return flux.diffusers_velocity(flux.emulate(tensors, config, **options), **flux.inputs())


@pytest.fixture(scope="module", params=["nvfp4", "nvfp4_mixed"])
def folder(request, tiny):
    return getattr(tiny, request.param)


def test_the_decoder_of_these_tests_is_nvidias(tiny):
    """decode_nvfp4 against nvidia-modelopt's own NVFP4QTensor.dequantize."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors = flux.stored(tiny.nvfp4)
    layer = "transformer_blocks.0.ff.net.2"
    codes, block, scale = (tensors[f"{layer}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
    quantized = NVFP4QTensor((codes.shape[0], codes.shape[1] * 2), torch.float32, codes)
    theirs = quantized.dequantize(torch.float32, scale=block, double_scale=scale, block_sizes={-1: 16})
    assert torch.equal(decode_nvfp4(codes, block, scale), theirs)


def test_fake_activations_are_kitchens():
    """fake_nvfp4 against comfy-kitchen's eager quantize and dequantize."""
    import comfy_kitchen

    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[3] = 0
    scale = x.abs().max() / 2688
    codes, block = comfy_kitchen.quantize_nvfp4(x, scale)
    assert torch.equal(fake_nvfp4(x, scale), comfy_kitchen.dequantize_nvfp4(codes, scale, block, torch.float32))


def test_dequantized_weights_are_the_stored_bytes_exactly(folder):
    import comfy.utils

    loaded = load(folder)
    assert loaded.description.family == "modelopt-nvfp4"
    actual = {name: p.dequantize() if hasattr(p, "_layout_cls") else p.float()
              for name, p in loaded.patcher.model.diffusion_model.named_parameters() if "input_scale" not in name}
    table = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 256})
    native: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in flux.dequantize(flux.stored(folder)).items():
        target = table[name]
        key, offset, change = (target, 0, None) if isinstance(target, str) else \
            (target[0], target[1][1] if target[1] else 0, target[2] if len(target) > 2 else None)
        native.setdefault(key, {})[offset] = change(value) if change else value
    expected = {name: torch.cat([rows[k] for k in sorted(rows)]) for name, rows in native.items()}
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_shards_with_another_tensor_scale_stay_apart(tiny):
    """q, k, v share a tensor scale in a real export and proj_mlp has its own: one native layout each way."""
    tensors = flux.stored(tiny.nvfp4)
    block = "single_transformer_blocks.0"
    scales = [tensors[f"{block}.{part}.weight_scale_2"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert scales[0] == scales[1] == scales[2] != scales[3]
    patcher = load(tiny.nvfp4).patcher
    linear1 = patcher.get_model_object("diffusion_model.single_blocks.0.linear1")
    tiles = tiles_of(linear1.weight)
    assert [tile.place.codec for tile in tiles] == ["nvfp4"] * 4
    assert all(torch.equal(tile["scale"], scale) for tile, scale in zip(tiles, scales, strict=True))
    qkv = patcher.get_model_object("diffusion_model.double_blocks.0.img_attn.qkv")
    assert qkv.layout_type == "TensorCoreNVFP4Layout"


def test_emulated_forward_equals_dequantized_weights(folder):
    loaded = load(folder)
    assert "NVFP4 runs: dequantize (chosen for this device) on cpu: it has no NVFP4 matmul" in loaded.report and "low nibble" in loaded.report
    expected = reference(flux.dequantize(flux.stored(folder)), flux.config_of(folder))
    assert flux.rel_l2(run(loaded), expected) < FORWARD
    assert flux.rel_l2(run(load(folder, compute="dequantize")), expected) < FORWARD


def weight_only(folder) -> tuple[str, ...]:
    """Modules whose activations stay: those detection reads, and partly quantized linear1."""
    names = flux.stored(folder)
    mixed = tuple(f"single_transformer_blocks.{i}.attn.to_{x}" for i in range(2) for x in "qkv"
                  if f"single_transformer_blocks.{i}.proj_mlp.weight_scale_2" not in names)
    return DETECTED + mixed


def test_static_forward_equals_emulation(folder):
    emulated = flux.emulate(flux.stored(folder), flux.config_of(folder), weight_only=weight_only(folder))
    assert flux.agrees(load(folder, compute="native").patcher, emulated)
    assert not flux.agrees(load(folder).patcher, emulated)


def test_missing_input_scales_are_dynamic(tiny, tmp_path):
    """Never 1.0: the published FLUX.2 -mixed file lacks those of txt_mlp
    (docs/sources/modelopt.md, "FLUX.2-dev-NVFP4")."""
    tensors, config = flux.stored(tiny.nvfp4), flux.config_of(tiny.nvfp4)
    tensors = {k: v for k, v in tensors.items() if not (k.endswith("input_scale") and "ff_context" in k)}
    loaded = load(flux.save(tmp_path, tensors, config), compute="native")
    assert "dynamic activation scales in 4 layers" in loaded.report
    assert flux.agrees(loaded.patcher, flux.emulate(tensors, config, weight_only=DETECTED))


ORDERS = {
    "ModelOpt": ({}, False, False), "ModelOpt, said": ({"swap_weight_nibbles": False}, False, False),
    "Comfy markers": ({}, True, True), "high first, row-major": ({"swap_weight_nibbles": True}, "nibbles", False),
    "nested": ({"quantization": {"swap_weight_nibbles": True}}, "nibbles", False),
}


@pytest.mark.parametrize("name", ORDERS)
def test_byte_orders(name, tiny, tmp_path):
    declared, reorder, markers = ORDERS[name]
    tensors, config = flux.stored(tiny.nvfp4), flux.config_of(tiny.nvfp4)
    config["quantization_config"].update(declared)
    if reorder:
        swapped = comfy_order(tensors)
        tensors |= {k: v for k, v in swapped.items() if reorder is True or k.endswith(".weight")}
    if markers:
        tensors |= {k.replace("weight_scale_2", "comfy_quant"): torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
                    for k in list(tensors) if k.endswith("weight_scale_2")}
    loaded = load(flux.save(tmp_path, tensors, config))
    assert loaded.description.byte_order.low_first is (not reorder) and loaded.description.byte_order.swizzled is markers
    assert torch.equal(run(loaded), run(load(tiny.nvfp4)))


def test_a_file_takes_the_declaration_beside_it(tiny, tmp_path):
    """Weights only, as the reference names a file; config.json beside it still says how the bytes are packed."""
    tensors, config = flux.stored(tiny.nvfp4), flux.config_of(tiny.nvfp4)
    config["quantization_config"]["swap_weight_nibbles"] = True
    tensors |= {k: v for k, v in comfy_order(tensors).items() if k.endswith(".weight")}
    folder = flux.save(tmp_path, tensors, config)
    loaded = load(next(folder.glob("*.safetensors")))
    assert loaded.description.declared_in == ["config.json"] and not loaded.description.byte_order.low_first
    assert torch.equal(run(loaded), run(load(tiny.nvfp4)))


def test_header_only_comfy_metadata(tiny, tmp_path):
    """Layers listed as ComfyUI lists them, without a method, are ComfyUI's order even without marker tensors."""
    tensors, config = flux.stored(tiny.nvfp4), flux.config_of(tiny.nvfp4)
    layers = {k.removesuffix(".weight_scale_2"): {"format": "nvfp4"} for k in tensors if k.endswith("weight_scale_2")}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    del config["quantization_config"]
    loaded = load(flux.save(tmp_path / "comfy", comfy_order(tensors), config, metadata))
    assert torch.equal(run(loaded), run(load(tiny.nvfp4)))
    # the same list beside ModelOpt's declaration (enable_layerwise_quant_metadata) keeps ModelOpt's order
    metadata["quantization_config"] = json.dumps({"quant_method": "modelopt", "quant_algo": "NVFP4"})
    loaded = load(flux.save(tmp_path / "modelopt", tensors, config, metadata))
    assert torch.equal(run(loaded), run(load(tiny.nvfp4)))


def packed_qkv(tiny) -> dict[str, torch.Tensor]:
    """A raw export with packed q/k/v as Black Forest Labs publish it: native names, high nibble first, tiled scales."""
    import comfy.utils

    tensors, config = comfy_order(flux.stored(tiny.nvfp4)), flux.stored(tiny.nvfp4)
    table = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 256})
    native: dict[str, torch.Tensor] = {}
    for i in range(2):
        for stream, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            layers = [f"transformer_blocks.{i}.attn.{p}" for p in parts]
            to = f"double_blocks.{i}.{stream}_attn.qkv"
            native[f"{to}.weight"] = torch.cat([tensors[f"{x}.weight"] for x in layers])
            native[f"{to}.bias"] = torch.cat([tensors[f"{x}.bias"] for x in layers])
            native[f"{to}.weight_scale"] = swizzle(torch.cat([config[f"{x}.weight_scale"] for x in layers]))
            for leaf in ("weight_scale_2", "input_scale"):
                native[f"{to}.{leaf}"] = tensors[f"{layers[0]}.{leaf}"]
    dense = flux.dequantize(config)
    for name, value in dense.items():  # the rest in BF16, as the host's own table renames it
        target = table[name]
        key = target if isinstance(target, str) else target[0]
        if key.removesuffix(".weight").removesuffix(".bias") + ".weight_scale" in native:
            continue
        value = value.to(torch.bfloat16)
        if isinstance(target, str) or target[1] is None:
            native[key] = value if isinstance(target, str) or len(target) < 3 else target[2](value)
        else:
            native[key] = torch.cat([native[key], value]) if key in native else value
    return {k.replace("_norm.weight", "_norm.scale"): v for k, v in native.items()}


@pytest.mark.parametrize("without_txt_mlp", [False, True])
def test_packed_qkv_raw_export(without_txt_mlp, tiny, tmp_path):
    tensors = packed_qkv(tiny)
    if without_txt_mlp:
        tensors = {k: v for k, v in tensors.items() if not (k.endswith("input_scale") and "txt_attn" in k)}
    folder = flux.save(tmp_path, tensors, None, name="flux1-nvfp4.safetensors")
    loaded = load(folder / "flux1-nvfp4.safetensors")
    assert loaded.description.formats["NVFP4"] == 4
    assert "high nibble, block scales in 128 x 4 tiles (packed q/k/v" in loaded.report
    assert ("dynamic activation scales in 2 layers" in loaded.report) == without_txt_mlp
    qkv = loaded.patcher.get_model_object("diffusion_model.double_blocks.1.txt_attn.qkv")
    exact = flux.dequantize(flux.stored(tiny.nvfp4))
    parts = [exact[f"transformer_blocks.1.attn.add_{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(qkv.weight.dequantize(), torch.cat(parts))


def test_comfy_order_stays_a_view(tiny, tmp_path):
    """Bytes that are already the host's are not copied."""
    from quantized_transformers.loaders.architectures.flux1 import FLUX1
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate
    from support.common import assembled

    folder = flux.save(tmp_path, packed_qkv(tiny), None, name="flux1-nvfp4.safetensors")
    checkpoint = Checkpoint(locate(str(folder / "flux1-nvfp4.safetensors")))
    description = describe(checkpoint)
    stored = checkpoint.load_tensors()
    mapped = {t.data_ptr() for t in stored.values()}
    native = assembled(FLUX1, description.dims, description.naming, stored, order=description.byte_order)
    assert not [name for name, t in native.tensors.items() if t.data_ptr() not in mapped
                and not name.endswith((".comfy_quant", ".input_scale", ".weight_t0_input_scale", ".weight_scale_2"))]


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (48, 80), (100, 64), (128, 64), (300, 144)])
def test_odd_sizes_padded_or_not(rows, columns):
    """Row counts that fill neither 16 nor 128, block counts that do not fill 4."""
    import comfy_kitchen

    g = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g)
    block = torch.rand(rows, columns // 16, generator=g).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.01)
    expected = decode_nvfp4(codes, block, scale)
    part = {"weight": codes, "weight_scale": block, "weight_scale_2": scale}
    comfy = {"weight": (codes << 4) | (codes >> 4), "weight_scale": swizzle(block), "weight_scale_2": scale}
    for stored, order in ((part, ByteOrder()), (comfy, ByteOrder(False, True))):
        tile, = NVFP4_FORMAT.coded("x", stored, order).tiles
        assert torch.equal(codec("nvfp4").dequantize(tile, torch.float32), expected)
        native = join([tile], ["x"], (rows, columns), full_precision=True).tensors
        assert native["weight"].shape[0] % 16 == 0
        decoded = comfy_kitchen.dequantize_nvfp4(native["weight"], scale, native["weight_scale"], torch.float32)
        assert torch.equal(decoded[:rows], expected) and not decoded[rows:].any()


@pytest.mark.parametrize(("leaf", "value", "message"), [
    ("weight_scale_2", torch.tensor(0.0), "weight_scale_2 is 0.0"),
    ("weight_scale_2", torch.ones(2), "weight_scale_2 is \\[2\\]"),
    ("input_scale", torch.tensor(float("nan")), "input_scale is nan"),
    ("weight_scale", torch.ones(256, 8).to(torch.float8_e4m3fn), "weight_scale is \\[256, 8\\]"),
    ("weight", torch.zeros(256, 256, dtype=torch.uint8), "two codes a byte"),
    ("pre_quant_scale", torch.ones(255), "pre_quant_scale is F32 \\[255\\], expected floats \\[256\\]"),
])
def test_refusals(leaf, value, message, tiny, tmp_path):
    from quantized_transformers.loaders.errors import CheckpointError

    tensors = flux.stored(tiny.nvfp4)
    tensors[f"transformer_blocks.0.attn.to_q.{leaf}"] = value
    with pytest.raises(CheckpointError, match=message):
        load(flux.save(tmp_path, tensors, flux.config_of(tiny.nvfp4)))


def test_saved_and_loaded_again(tiny, tmp_path):
    import comfy.sd

    first = load(tiny.nvfp4)
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, first.patcher)
    assert torch.equal(run(load(path)), run(first))


def mixture(tiny) -> dict[str, torch.Tensor]:
    """BF16, FP8 and NVFP4 in one file, and groups of all three: q NVFP4, k FP8, v BF16, proj_mlp FP8."""
    nv, fp8, bf16 = (flux.stored(f) for f in (tiny.nvfp4, tiny.fp8, tiny.bf16))
    out = {}
    for name in bf16:
        layer = name.removesuffix(".weight").removesuffix(".bias")
        source = nv if "ff.net" in layer or layer.endswith(("to_q", "add_q_proj")) else \
            fp8 if layer.endswith(("to_k", "add_k_proj", "proj_mlp", "to_out.0", "norm.linear")) else bf16
        out |= {k: v for k, v in source.items() if k.rpartition(".")[0] == layer and (
            k.endswith(("weight", "bias")) or source is not bf16)}
    return out


def test_mixed_formats_in_one_file_and_in_one_group(tiny, tmp_path):
    tensors, config = mixture(tiny), {k: v for k, v in flux.config_of(tiny.bf16).items()}
    loaded = load(flux.save(tmp_path, tensors, config), compute="native", byte_order="modelopt")
    assert set(loaded.description.formats) == {"BF16", "FP8", "NVFP4"}
    assert loaded.report.count("partly quantized group") == 6
    exact = flux.dequantize(tensors)
    qkv = loaded.patcher.get_model_object("diffusion_model.double_blocks.1.img_attn.qkv").weight
    assert torch.equal(qkv.dequantize(), torch.cat([exact[f"transformer_blocks.1.attn.to_{x}.weight"] for x in "qkv"]))
    linear1 = loaded.patcher.get_model_object("diffusion_model.single_blocks.0.linear1").weight
    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    assert torch.equal(linear1.dequantize(), torch.cat([exact[f"single_transformer_blocks.0.{p}.weight"] for p in parts]))
    groups = tuple(k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale")
                   and any(p in k for p in ("to_q.", "to_k.", "add_q_", "add_k_", "proj_mlp")))
    assert flux.agrees(loaded.patcher, flux.emulate(tensors, config, weight_only=groups))

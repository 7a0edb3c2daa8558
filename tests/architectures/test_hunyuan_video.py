"""HunyuanVideo against diffusers: bytes, forwards, LoRAs and overrides. Names are in test_hunyuan_video_names.py.
ComfyUI runs in fp32 on this CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.base import Naming
from quantized_transformers.loaders.architectures.hunyuan_video import HUNYUAN_VIDEO
from quantized_transformers.loaders.errors import CheckpointError
from support import common, hunyuan_video
from support import lora as lora_tools
from support.common import assembled
from support.flux2 import Rows, host_shapes, layer_errors

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
    """Folders of one seeded tiny HunyuanVideo (2 heads, 1 + 2 blocks, 2 refiner blocks)."""

    bf16: Path
    fp8: Path  # every Linear FP8 but proj_out, each of q, k, v with its own scale
    mixed: Path  # modulation, feed-forward of the double blocks and embedders left in BF16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    root = tmp_path_factory.mktemp("hunyuan")
    made = Tiny(root / "bf16", root / "fp8", root / "mixed")
    source = hunyuan_video.make()
    source.save_pretrained(made.bf16)
    hunyuan_video.export(source, made.fp8)
    hunyuan_video.export(source, made.mixed, keep=hunyuan_video.FALLBACK)
    return made


@pytest.fixture(scope="module", params=["fp8", "mixed"])
def folder(request, tiny) -> Path:
    return getattr(tiny, request.param)


VENDOR = hunyuan_video.vendor_by_host()


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Where the stored rows belong, from the model ComfyUI builds and diffusers' converter."""
    import comfy.sd

    # the host makes a native model of this size when it is given these; only shapes are used
    shapes = {"img_in.proj.weight": (256, 16, 1, 2, 2), "final_layer.linear.weight": (64, 256),
              "vector_in.in_layer.weight": (256, 768), "guidance_in.in_layer.weight": (256, 256),
              "txt_in.input_embedder.weight": (256, 64), "txt_in.individual_token_refiner.blocks.0.norm1.weight": (256,),
              "double_blocks.0.img_mod.lin.weight": (1536, 256), "single_blocks.0.linear2.weight": (256, 1280),
              "single_blocks.1.linear2.weight": (256, 1280)}
    patcher = comfy.sd.load_diffusion_model_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})
    built = host_shapes(patcher)
    assert built.keys() == VENDOR.keys()

    def convert(native):
        return hunyuan_video.convert({VENDOR[name]: value for name, value in native.items()}, hidden=256)

    return Rows(built, convert)


def load(folder, **request):
    return model.load(model.Request(str(folder), **request), quiet=True)


def run(patcher):
    return hunyuan_video.comfy_velocity(patcher, **hunyuan_video.inputs())


@pytest.mark.parametrize(("heads", "guidance"), [(1, True), (2, True), (2, False)])
def test_bf16_folder_equals_diffusers(heads, guidance, tmp_path):
    reference = hunyuan_video.make(heads=heads, guidance=guidance, seed=heads)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == "HunyuanVideo"
    assert loaded.description.dims["guidance"] == guidance
    expected = hunyuan_video.diffusers_velocity(reference.float(), **hunyuan_video.inputs())
    assert common.rel_l2(run(loaded.patcher), expected) < FORWARD


@pytest.mark.parametrize(("channels", "config"), [(33, "HunyuanVideoI2V"), (32, "HunyuanVideoSkyreelsI2V")])
def test_image_to_video(channels, config, tmp_path):
    """The image is concatenated to the latents; the host's class for it is another."""
    reference = hunyuan_video.make(channels=channels)
    reference.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.patcher.model.model_config).__name__ == config
    inputs = hunyuan_video.inputs(channels=channels)
    expected = hunyuan_video.diffusers_velocity(reference.float(), **inputs)
    latents, image = inputs.pop("x").split([16, channels - 16], 1)
    actual = common.apply_model(loaded.patcher, latents, inputs["sigma"], c_concat=image, c_crossattn=inputs["text"],
                                y=inputs["pooled"], guidance=inputs["guidance"])
    assert common.rel_l2(actual, expected) < FORWARD


def test_odd_token_counts(tiny):
    inputs = hunyuan_video.inputs(frames=3, height=10, width=14, text=5)
    expected = hunyuan_video.diffusers_velocity(hunyuan_video.make().float(), **inputs)
    assert common.rel_l2(hunyuan_video.comfy_velocity(load(tiny.bf16).patcher, **inputs), expected) < FORWARD


@pytest.mark.parametrize(("style", "prefix"), [("vendor", ""), ("vendor", "model.diffusion_model."), ("weight", ""),
                                               ("weight", "model.model."), ("scale", "model.diffusion_model.")])
def test_native_names(style, prefix, tiny, rows, tmp_path):
    """The same model as the vendor names it, as ComfyUI does, and as it did when norms ended in "scale"."""
    named = {}
    for name, value in rows.to_native(common.stored(tiny.bf16)).items():
        name = VENDOR[name] if style == "vendor" else name.replace("_norm.weight", f"_norm.{style}")
        named[prefix + name] = value
    loaded = load(common.save(tmp_path, named, None, name="hunyuan.safetensors") / "hunyuan.safetensors")
    assert loaded.description.naming == (Naming("vendor", prefix) if style == "vendor" else
                                         Naming("native", prefix, style))
    expected = hunyuan_video.diffusers_velocity(hunyuan_video.make().float(), **hunyuan_video.inputs())
    assert common.rel_l2(run(loaded.patcher), expected) < FORWARD


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
    # q, k, v of the double block's two streams and of the two refiner blocks, and q, k, v, mlp, become one module each
    assert len(quantized) == len(codes) - 2 * 2 - 2 * 3 - (2 * 2 if folder == tiny.fp8 else 0)
    inner = [t for m in quantized for t in m.weight.layout_cls.get_plain_tensors(m.weight)]
    assert sum(t.numel() for t in inner if t.dtype == torch.float8_e4m3fn) == sum(codes.values())


def test_emulated_forward_equals_dequantized_weights(folder):
    """The default on this CPU: FP8 in memory, full-precision matmul."""
    dequantized = hunyuan_video.emulate(common.dequantize(common.stored(folder)), common.config_of(folder))
    expected = hunyuan_video.diffusers_velocity(dequantized, **hunyuan_video.inputs())
    for compute in ("auto", "dequantize"):
        assert common.rel_l2(run(load(folder, compute=compute).patcher), expected) < FORWARD


def test_static_layers_are_the_definition(folder, rows):
    """In a forward with FP8 activations every quantized layer computes q(x) W + b, to fp32 rounding."""
    errors = layer_errors(load(folder, compute="native").patcher, run, rows, common.stored(folder))
    assert {name: error for name, error in errors.items() if not error < LAYER} == {}


def test_static_forward_equals_emulation(folder):
    emulated = hunyuan_video.emulate(common.stored(folder), common.config_of(folder))
    native, plain = load(folder, compute="native").patcher, load(folder).patcher
    errors, effects = [], []
    for seed in (1, 2, 3):
        inputs = hunyuan_video.inputs(seed=seed)
        expected = hunyuan_video.diffusers_velocity(emulated, **inputs)
        errors.append(common.rel_l2(hunyuan_video.comfy_velocity(native, **inputs), expected))
        effects.append(common.rel_l2(hunyuan_video.comfy_velocity(plain, **inputs), expected))
    assert min(errors) < EMULATED and max(errors) < 0.5 * min(effects), errors
    assert min(effects) > 10 * EMULATED  # the activations really were quantized


def test_nvfp4_forward_equals_dequantized_weights(tmp_path):
    """modelopt does not unify the second scale of q, k and v for this class."""
    folder = hunyuan_video.export(hunyuan_video.make(), tmp_path, "NVFP4")
    loaded = load(folder)
    assert loaded.description.formats == {"NVFP4": 50, "BF16": 3}
    dequantized = hunyuan_video.emulate(common.dequantize(common.stored(folder)), common.config_of(folder))
    expected = hunyuan_video.diffusers_velocity(dequantized, **hunyuan_video.inputs())
    assert common.rel_l2(run(loaded.patcher), expected) < FORWARD


FUSED = {"double": ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv"],
         "refiner": [f"txt_in.individual_token_refiner.blocks.{i}.self_attn.qkv" for i in range(2)],
         "single": [f"single_blocks.{i}.linear1" for i in range(2)]}


@pytest.mark.parametrize(("which", "plain"), [("bf16", ["double", "refiner", "single"]), ("fp8", []),
                                              ("mixed", ["refiner"])])
def test_views_up_to_the_hosts_call(which, plain, tiny):
    """Only BF16 tensors that the host fuses and the swapped modulation are copies; the rest is the mapped file."""
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate

    checkpoint = Checkpoint(locate(str(getattr(tiny, which))))
    description = describe(checkpoint)
    stored = checkpoint.load_tensors()
    kept = list(stored.values())
    mapped = {t.data_ptr() for t in kept}
    native = assembled(HUNYUAN_VIDEO, description.dims, description.naming, stored)
    copied = {name for name, t in native.tensors.items() if t.data_ptr() not in mapped
              and not name.endswith((".comfy_quant", ".weight_scale", ".input_scale", ".weight_t0_input_scale", ".bias"))}
    assert copied == {"final_layer.adaLN_modulation.1.weight",
                      *(f"{layer}.weight" for group in plain for layer in FUSED[group])}


@pytest.mark.parametrize("guidance", [True, False])
def test_deferred(guidance, rows, tmp_path):
    """Without weight files: every parameter that the host's model has, and no memory."""
    hunyuan_video.make(guidance=guidance).save_config(tmp_path)
    patcher = model.defer(model.Request(str(tmp_path))).patcher
    shapes = {name: shape for name, shape in rows.shapes.items() if guidance or not name.startswith("guidance_in.")}
    assert host_shapes(patcher) == shapes
    assert all(p.is_meta for p in patcher.model.diffusion_model.parameters())


@pytest.mark.parametrize("kind", ["component", "weights"])
def test_override_of_a_deferred_base(kind, tiny):
    deferred = model.defer(model.Request(str(tiny.bf16))).patcher
    assert torch.equal(run(model.override(deferred, model.Request(str(tiny.fp8)), kind).patcher),
                       run(load(tiny.fp8).patcher))


def test_override_of_another_model(tiny, tmp_path):
    hunyuan_video.make(channels=33).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="in 33"):
        model.override(model.defer(model.Request(str(tiny.bf16))).patcher, model.Request(str(tmp_path)))
    later = model.defer(model.Request(str(tiny.bf16))).patcher
    for key, value in {"vec_in_dim": None, "byt5": True, "vision_in_dim": 1152, "patch_size": [1, 1, 1]}.items():
        unet_config = later.model.model_config.unet_config
        assert HUNYUAN_VIDEO.dims_from_model(unet_config) is not None
        assert HUNYUAN_VIDEO.dims_from_model({**unet_config, key: value}) is None


def test_saved_by_the_host_and_loaded_again(tiny, tmp_path):
    import comfy.sd

    patcher = load(tiny.fp8).patcher
    expected = run(patcher)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patcher)
    again = load(tmp_path / "saved.safetensors")
    assert again.description.naming == Naming("native", "model.model.")
    assert torch.equal(run(again.patcher), expected)


# By the host's tables: native names, and those of diffusion-pipe, which are the vendor's.
LORA = {"diffusion_model.double_blocks.0.img_attn.qkv": (768, 256), "diffusion_model.single_blocks.1.linear1": (1792, 256),
        "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn.qkv": (768, 256),
        "diffusion_model.final_layer.linear": (64, 256), "diffusion_model.double_blocks.0.txt_mlp.2": (256, 1024),
        "transformer.double_blocks.0.txt_attn_qkv": (768, 256), "transformer.double_blocks.0.img_mlp.fc1": (1024, 256),
        "transformer.single_blocks.0.modulation.linear": (768, 256), "transformer.single_blocks.0.linear2": (256, 1280)}


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
    save_file(lora, str(folder / "tiny-hunyuan.safetensors"))

    def load_lora(patcher):
        patched = LoraLoaderModelOnly().load_lora_model_only(patcher, "tiny-hunyuan.safetensors", 1.0)[0]
        assert sum(map(len, patched.patches.values())) == len(LORA)
        return patched

    with common.model_folder("loras", folder):
        yield load_lora


def low_vram(patcher):
    return lora_tools.low_vram(patcher, lambda p: hunyuan_video.comfy_velocity(p, load=False, **hunyuan_video.inputs()))


def merged(folder, lora, rows) -> torch.Tensor:
    """diffusers' forward with the LoRA merged into the weights by its definition, W + B A, in F32."""
    tensors = common.dequantize(common.stored(folder))
    delta = {f"{name.partition('.')[2]}.weight": lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
             for name in LORA}
    native = hunyuan_video.by_host(delta)
    changed = 0
    for name in tensors:
        add = rows.to_stored(name, native)
        if add is not None:
            tensors[name] = tensors[name] + add
            changed += 1
    assert changed == len(LORA) + 3 * 2 + 3  # q, k, v of three layers, and q, k, v, mlp of one
    return hunyuan_video.diffusers_velocity(hunyuan_video.emulate(tensors, common.config_of(folder)),
                                            **hunyuan_video.inputs())


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

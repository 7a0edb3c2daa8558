"""Models whose layers are in formats of several families: whatever wrote a file or made a MODEL, all of it loads."""

from __future__ import annotations

import json
import re

import comfy_kitchen
import pytest
import torch
from safetensors.torch import save_file

from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.makers import online_mxfp8
from support import common, flux, svdquant_models
from support import lora as lora_tools
from support.mx import mx

pytestmark = pytest.mark.parity

FORWARD = 1e-5  # fp32 forwards of the same network in two implementations (test_flux1.py)
KINDS = ("nvfp4", "mxfp8", "float8_e4m3fn", "int8_tensorwise", "")
ROW = re.compile(r"(double|single)_blocks\.\d+\..*(qkv|proj|linear[12]|mlp\.[02]|lin)\.weight$")


def quantized(weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors of a layer in a format of the host's, what they stand for in F32), by comfy-kitchen's eager ops."""
    if kind == "nvfp4":
        scale = weight.abs().amax() / (448 * 6)
        codes, block = comfy_kitchen.quantize_nvfp4(weight, scale)
        return ({"weight": codes, "weight_scale": block, "weight_scale_2": scale},
                comfy_kitchen.dequantize_nvfp4(codes, scale, block, torch.float32))
    if kind == "mxfp8":
        codes, scale = comfy_kitchen.quantize_mxfp8(weight)
        return {"weight": codes, "weight_scale": scale.view(torch.uint8)}, \
            comfy_kitchen.dequantize_mxfp8(codes, scale, torch.float32)
    if kind == "float8_e4m3fn":
        scale = weight.abs().amax() / 448
        codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.05)}, codes.float() * scale
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a native FLUX.1 file whose layers take turns in NVFP4, MXFP8, FP8, INT8 and BF16, the same dequantized)."""
    folder = tmp_path_factory.mktemp("turns")
    flux.make().float().save_pretrained(folder / "plain")
    native = model.load(model.Request(str(folder / "plain"), dtype="fp32"), quiet=True).patcher.model.diffusion_model
    tensors = {name: t.detach().clone() for name, t in native.state_dict().items()}
    file, dense, turn = {}, dict(tensors), 0
    for name, weight in tensors.items():
        kind = KINDS[turn % len(KINDS)] if ROW.search(name) else ""
        turn += bool(ROW.search(name))
        if not kind:
            file[name] = weight.bfloat16()
            dense[name] = file[name].float()
            continue
        layer, dense[name] = quantized(weight, kind)
        prefix = name.removesuffix("weight")
        marker = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        file |= {prefix + leaf: t for leaf, t in layer.items()} | {f"{prefix}comfy_quant": marker}
    save_file({name: t.contiguous() for name, t in file.items()}, str(folder / "turns.safetensors"))
    save_file({name: t.contiguous() for name, t in dense.items()}, str(folder / "dense.safetensors"))
    return folder


def test_a_file_of_five_formats(made):
    """Every layer by its own marker, weights exactly what kitchen's decoders make of the bytes."""
    loaded = model.load(model.Request(str(made / "turns.safetensors"), compute="dequantize", dtype="fp32"), quiet=True)
    assert loaded.description.family == "comfy"
    assert loaded.description.formats.keys() == {"NVFP4", "MXFP8", "FP8", "INT8", "BF16"}
    dense = model.load(model.Request(str(made / "dense.safetensors"), dtype="fp32"), quiet=True)
    inputs = flux.inputs()
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **inputs), flux.comfy_velocity(dense.patcher, **inputs)) < FORWARD
    ours, theirs = (p.patcher.model.diffusion_model for p in (loaded, dense))
    for name, module in ours.named_modules():
        if hasattr(getattr(module, "weight", None), "_layout_cls"):
            assert torch.equal(module.weight.dequantize().float(), theirs.get_submodule(name).weight.float()), name


def test_five_formats_run_as_stock_comfyui_runs_them(made):
    import comfy.sd

    stock = comfy.sd.load_diffusion_model(str(made / "turns.safetensors"))
    loaded = model.load(model.Request(str(made / "turns.safetensors")), quiet=True)
    inputs = flux.inputs()
    # sums in another order, and where an INT8 layer rounds its activations, now and then to the next of 127 codes
    assert common.rel_l2(flux.comfy_velocity(loaded.patcher, **inputs), flux.comfy_velocity(stock, **inputs)) < 1e-4


@pytest.mark.parametrize("listed", ["", "model.diffusion_model."])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_formats_listed_in_the_metadata_alone(prefix, listed, made, tmp_path):
    """The same file without markers: the list of layers in its header says the formats, as older writers have it."""
    from safetensors.torch import load_file

    tensors = load_file(str(made / "turns.safetensors"))
    layers = {listed + name.removesuffix(".comfy_quant"): json.loads(bytes(tensors.pop(name).tolist()))
              for name in list(tensors) if name.endswith(".comfy_quant")}
    path = str(tmp_path / "listed.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path,
              {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})
    loaded, marked = (model.load(model.Request(p), quiet=True) for p in (path, str(made / "turns.safetensors")))
    assert loaded.description.formats == marked.description.formats and loaded.description.family == "comfy"
    assert torch.equal(flux.comfy_velocity(loaded.patcher, **flux.inputs()), flux.comfy_velocity(marked.patcher, **flux.inputs()))


def test_a_format_that_nobody_has_is_refused(made, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(str(made / "turns.safetensors"))
    name = next(name for name in tensors if name.endswith(".comfy_quant"))
    tensors[name] = torch.tensor(list(b'{"format": "nvfp3"}'), dtype=torch.uint8)
    save_file(tensors, str(tmp_path / "new.safetensors"))
    with pytest.raises(CheckpointError, match="says 'nvfp3', which this version does not load"):
        model.load(model.Request(str(tmp_path / "new.safetensors")), quiet=True)


@pytest.fixture(scope="module")
def svdquant(tmp_path_factory):
    made = svdquant_models.make_flux()
    return made, made.write(tmp_path_factory.mktemp("svdq"))


def test_mxfp8_behind_svdquant(svdquant, tmp_path):
    """What SVDQuant leaves in BF16 becomes MXFP8, the rest stays; forwards against diffusers on the decoded weights."""
    made, path = svdquant
    base = model.load(model.Request(str(path), backend="dequantize", dtype="fp32"), quiet=True).patcher
    before = flux.comfy_velocity(base, **flux.inputs())
    patcher, report = online_mxfp8.quantize(base, "^$", step=lambda: None)
    assert "quantized already, left as they are: " in report
    reference = made.dequantized()
    changed = 0
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in made.linears and not any(
                    size % online_mxfp8.MULTIPLE for size in module.weight.shape):
                module.weight.copy_(mx(module.weight))
                changed += 1
    assert changed == int(re.search(r"MXFP8: (\d+) Linear", report)[1])
    expected = flux.diffusers_velocity(reference, **flux.inputs())
    assert common.rel_l2(flux.comfy_velocity(patcher, **flux.inputs()), expected) < FORWARD
    assert common.rel_l2(before, expected) > 100 * FORWARD and torch.equal(flux.comfy_velocity(base, **flux.inputs()), before)
    factory, arguments = patcher.cached_patcher_init
    assert torch.equal(flux.comfy_velocity(factory(*arguments), **flux.inputs()), flux.comfy_velocity(patcher, **flux.inputs()))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_mxfp8_behind_svdquant_whose_clone_carries_patches(kind, svdquant, tmp_path):
    """A clone with a LoRA has been loaded last; LoKr goes into a tensor of its own beside the parts."""
    made, path = svdquant
    base = model.load(model.Request(str(path), backend="dequantize", dtype="fp32"), quiet=True).patcher
    expected = flux.comfy_velocity(online_mxfp8.quantize(base, "^$", step=lambda: None)[0], **flux.inputs())
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = lora_tools.random_lora({"transformer_blocks.0.attn.to_out.0": (256, 256)}) if kind == "lora" else {
        f"{name}.lokr_w1": torch.randn(16, 16) * .3, f"{name}.lokr_w2": torch.randn(16, 16) * .3}
    patched = lora_tools.load_lora(base, tensors, tmp_path)
    assert common.rel_l2(flux.comfy_velocity(patched, **flux.inputs()), flux.comfy_velocity(base, **flux.inputs())) > 1e-4
    flux.comfy_velocity(patched, **flux.inputs())
    quantized, _ = online_mxfp8.quantize(base, "^$", step=lambda: None)
    assert torch.equal(flux.comfy_velocity(quantized, **flux.inputs()), expected)


def test_lora_on_both(svdquant, tmp_path):
    """A LoRA behind the pair goes beside SVDQuant weights and into MXFP8 ones, and can be taken off again."""
    made, path = svdquant
    base = model.load(model.Request(str(path), backend="dequantize", dtype="fp32"), quiet=True).patcher
    patcher, _ = online_mxfp8.quantize(base, "^$", step=lambda: None)
    before = flux.comfy_velocity(patcher, **flux.inputs())
    shapes = {"transformer_blocks.0.attn.to_out.0": (256, 256), "x_embedder": (256, 64)}
    assert shapes == {name: tuple(made.model.get_submodule(name).weight.shape) for name in shapes}
    patched = lora_tools.load_lora(patcher, lora_tools.random_lora(shapes), tmp_path)
    assert common.rel_l2(flux.comfy_velocity(patched, **flux.inputs()), before) > 1e-4
    assert torch.equal(flux.comfy_velocity(patcher, **flux.inputs()), before)

"""Any model that the host knows, in its own names and every format: the weights that stock ComfyUI has of the same
numbers, and whatever is damaged is refused.

The tiny models are made of the host's own classes (support/host_models.py); what loads is compared with the host's own
load of the truth in F32, parameter by parameter: an output alone is blind for layers behind a norm.
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from quantized_transformers.host import model_identity, passthrough
from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures import ARCHITECTURES
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.describe import describe
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.quant.marker import marker
from support import bitsandbytes, common, host_models, host_sizes
from support.real_files import lora_agrees

pytestmark = pytest.mark.parity

E4M3 = torch.float8_e4m3fn
WHOLE = "model.diffusion_model."


def fp8(weight, conf=None, leaf="weight_scale"):
    scale = weight.abs().max() / 448
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    return {"weight": codes, leaf: scale} | ({"comfy_quant": marker({"format": "float8_e4m3fn"})} if conf else {}), codes.float() * scale


def nvfp4(weight, comfy):
    from comfy_kitchen import quantize_nvfp4
    from comfy_kitchen.float_utils import from_blocked

    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return None
    scale = weight.abs().max() / 2688
    codes, block = quantize_nvfp4(weight.contiguous(), scale)
    linear = from_blocked(block.view(torch.uint8), *[codes.shape[0], codes.shape[1] // 8]).contiguous().view(E4M3)
    low = codes << 4 | codes >> 4
    truth = common.decode_nvfp4(low, linear, scale)
    if comfy:
        return {"weight": codes, "weight_scale": block, "weight_scale_2": scale, "comfy_quant": marker({"format": "nvfp4"})}, truth
    return {"weight": low, "weight_scale": linear, "weight_scale_2": scale, "input_scale": torch.tensor(0.004)}, truth


def int8(weight, group=0):
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    if group and weight.shape[1] % group:
        return None
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256)
    conf = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    return {"weight": codes, "weight_scale": params.scale, "comfy_quant": marker(conf)}, TensorWiseINT8Layout.dequantize(codes, params)


def mxfp8(weight):
    from comfy_kitchen.tensor import get_layout_class

    if weight.shape[0] % 32 or weight.shape[1] % 32:
        return None
    layout = get_layout_class("TensorCoreMXFP8Layout")
    codes, params = layout.quantize(weight)
    return {"weight": codes, "weight_scale": params.scale.view(torch.uint8), "comfy_quant": marker({"format": "mxfp8"})}, \
        layout.dequantize(codes, params)


FORMS = {"BF16": None, "cast": lambda w: ({"weight": w.to(E4M3)}, w.to(E4M3).float()), "FP8": fp8,
         "FP8, marked": lambda w: fp8(w, True), "FP8, first names": lambda w: fp8(w, leaf="scale_weight"),
         "NVFP4, ModelOpt": lambda w: nvfp4(w, False), "NVFP4, marked": lambda w: nvfp4(w, True),
         "MXFP8, marked": mxfp8, "INT8, marked": int8, "ConvRot": lambda w: int8(w, 16),
         "bitsandbytes": lambda w: bitsandbytes.llm_int8(w) if w.shape[1] % 8 or w.shape[0] > w.shape[1] else
         bitsandbytes.four_bits(w, double=True)}


def stored_as(name, tensors, form):
    """(stored, truth): every Linear that the format can hold, the rest in BF16."""
    stored = {key: t if t.dtype != torch.float32 else t.to(torch.bfloat16) for key, t in tensors.items()}
    truth = {key: t.float() if t.dtype == torch.bfloat16 else t for key, t in stored.items()}
    if FORMS[form] is None:
        return stored, truth
    with host_models.detected(name):
        net = passthrough.network({key: tuple(t.shape) for key, t in tensors.items()}, host_models.metadata_of(name))
    for key, target in net.becomes.items():
        layer = key.removesuffix(".weight")
        made = FORMS[form](tensors[key]) if target and target.removesuffix(".weight") in net.linears and key != layer else None
        if made:
            del stored[key]
            stored |= {f"{layer}.{leaf}": t for leaf, t in made[0].items()}
            truth[key] = made[1]
    return stored, truth


def load(path, **options):
    return model.load(model.Request(str(path), **{"dtype": "fp32", **options}), quiet=True)


def stock(truth, name):
    import comfy.sd

    with host_models.detected(name):
        return comfy.sd.load_diffusion_model_state_dict(dict(truth), model_options={"dtype": torch.float32},
                                                        metadata=host_models.metadata_of(name) or None).model


def weights(net):
    """Name -> F32 numbers, of quantized weights what they mean; without what belongs to the quantization."""
    return {key: (p.dequantize() if hasattr(p, "_qdata") else p).float() for key, p in [*net.named_parameters(), *net.named_buffers()]
            if not key.endswith(".input_scale")}


@pytest.fixture(scope="module", params=host_models.MODELS)
def tiny(request):
    return request.param, host_models.make(request.param)


def test_every_class_of_the_host_has_a_model():
    """By the host's own detection."""
    import comfy.model_detection
    import comfy.supported_models

    found = set()
    for name in host_models.MODELS:
        with host_models.detected(name):
            found.add(type(comfy.model_detection.model_config_from_unet(host_models.make(name), "", metadata=host_models.metadata_of(name))))
    assert {kind for kind in comfy.supported_models.models if kind.__name__ not in passthrough.NO_DIFFUSION} == found


def test_every_form_has_stocks_weights(tiny, tmp_path):
    name, tensors = tiny
    for i, form in enumerate(FORMS):
        stored, truth = stored_as(name, tensors, form)
        if form != "BF16" and len(stored) == len(tensors) and form != "cast":
            continue  # no layer is as large as the format's blocks
        folder, prefix = tmp_path / str(i), WHOLE if i % 2 else ""
        common.save(folder, {prefix + key: t for key, t in stored.items()}, None, host_models.metadata_of(name), "model.safetensors")
        with host_models.detected(name):
            loaded = load(folder / "model.safetensors", byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
        reference = stock(truth, name)
        expected, found = weights(reference), weights(loaded.patcher.model)
        assert found.keys() == expected.keys(), form
        worst = max(expected, key=lambda key: float((found[key] - expected[key]).abs().max()) if expected[key].numel() else 0.0)
        assert torch.allclose(found[worst], expected[worst], rtol=2e-6, atol=1e-7), (form, worst)
        assert model_identity(loaded.patcher.model) == model_identity(reference), form
        quantized = sum(count for kind, count in loaded.description.formats.items() if kind not in ("BF16", "F32"))
        packed = sum(hasattr(p, "_qdata") for p in loaded.patcher.model.diffusion_model.parameters())
        told = sum("because ComfyUI detects the model by its width" in line for line in loaded.report.splitlines())
        assert packed == quantized - told and (quantized > 5 or form == "BF16"), (form, quantized, packed, told)


DAMAGE = {
    "missing": lambda t, layer: t.pop(f"{layer}.weight"), "extra": lambda t, layer: t.update({f"{layer}.more": torch.ones(3)}),
    "no scale": lambda t, layer: t.pop(f"{layer}.weight_scale"),
    "a scale that is no number": lambda t, layer: t.update({f"{layer}.weight_scale": torch.tensor(torch.nan)}),
    "transposed": lambda t, layer: t.update({f"{layer}.weight": t[f"{layer}.weight"][:, :-1].contiguous()}),
    "a vector missing": lambda t, layer: t.pop(next(key for key, v in t.items() if v.ndim == 1 and v.numel() > 1)),
    "half a model": lambda t, layer: [t.pop(key) for key in sorted(t)[: len(t) // 2]]}


@pytest.mark.parametrize("name", [name for name in host_models.MODELS if name not in host_models.FIXED])
def test_damage_is_refused(name, tmp_path):
    """Of models whose sizes the host itself detects."""
    with host_models.detected(name):
        tensors = host_models.make(name)
        stored, _ = stored_as(name, tensors, "FP8")
        net = passthrough.network({key: tuple(t.shape) for key, t in tensors.items()}, host_models.metadata_of(name))
        layers = sorted(key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")
                        and key.replace("_scale", "") not in net.by_columns and re.search(r"\.\d+\.", key))
        for i, (what, change) in enumerate(DAMAGE.items()):
            damaged = dict(stored)
            change(damaged, layers[len(layers) // 2])
            path = common.save(tmp_path / str(i), damaged, None, host_models.metadata_of(name), "model.safetensors")
            try:
                loaded = load(path / "model.safetensors")
            except CheckpointError:
                continue
            raise AssertionError(f"{what}: {loaded.report}")


def test_inspect_names_the_model_as_the_host_does(tiny, tmp_path):
    name, tensors = tiny
    path = common.save(tmp_path, stored_as(name, tensors, "FP8")[0], None, host_models.metadata_of(name), "model.safetensors")
    with host_models.detected(name):
        description = describe(Checkpoint(locate(str(path / "model.safetensors"))))
    net = stock(tensors, name)
    table = next((one for one in ARCHITECTURES if one.name == description.architecture), None)
    assert table or description.architecture == type(net.model_config).__name__
    architecture, dims = model.base_of(SimpleNamespace(model=net))
    told = dict.fromkeys(dims, 0) | description.dims if table else description.dims  # what a table does not tell is off
    if name.startswith("SD 2"):
        told = told | {"prediction": dims["prediction"]}  # only values tell it
    assert description.architecture == architecture and dims.items() <= told.items() and not description.problems
    assert table or dims.keys() == told.keys()
    assert description.naming.style == ("diffusers" if name == "Qwen-Image" else "native") and description.dims  # one style
    json.dumps(description.to_json())


# --- what else is done with such a model: those whose forward takes few arguments

def forward(patcher, name, load_it=True):
    g = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    x, conds = {
        "SD3.5 M": lambda: (noise(1, 16, 8, 8), {"c_crossattn": noise(1, 7, 64), "y": noise(1, 32)}),
        "Wan VACE": lambda: (noise(1, 16, 1, 8, 8), {"c_crossattn": noise(1, 7, 4096), "vace_context": noise(1, 1, 96, 1, 8, 8),
                                                    "vace_strength": [1.0]}),
        "LongCat-Image": lambda: (noise(1, 16, 8, 8), {"c_crossattn": noise(1, 7, 3584)}),
    }[name]()
    return common.apply_model(patcher, x, torch.tensor([0.5]), load_it, **conds)


RUN = ("SD3.5 M", "Wan VACE", "LongCat-Image")


def file_of(name, form, folder, prefix="", beside=None, rename=None):
    stored, truth = stored_as(name, host_models.make(name), form)
    tensors = {prefix + (rename(key) if rename else key): t for key, t in stored.items()} | (beside or {})
    common.save(folder, tensors, None, None, "model.safetensors")
    return folder / "model.safetensors", truth


def header_file(name, folder):
    """A file in FP8 with its header."""
    stored, _ = stored_as(name, host_models.make(name), "FP8")
    return common.save(folder, stored, None, host_models.metadata_of(name), "model.safetensors") / "model.safetensors"


def stock_patcher(truth, metadata=None):
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(truth), model_options={"dtype": torch.float32}, metadata=metadata)


@pytest.mark.parametrize("form", ["BF16", "FP8", "NVFP4, ModelOpt", "ConvRot"])
@pytest.mark.parametrize("name", RUN)
def test_forward(name, form, tmp_path):
    path, truth = file_of(name, form, tmp_path)
    loaded = load(path, compute="dequantize", byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
    assert common.rel_l2(forward(loaded.patcher, name), forward(stock_patcher(truth), name)) < 1e-5


@pytest.mark.parametrize("name", RUN)
def test_lora(name, tmp_path):
    """By the host's own keys, on quantized weights: in low VRAM exactly W + B A, fully loaded the same effect."""
    path, truth = file_of(name, "FP8", tmp_path)
    loaded = load(path, dtype="default")
    lora_agrees(loaded, truth, tmp_path / "lora", sorted(loaded.description.layers)[::5],
                lambda patcher, load_it=True: forward(patcher, name, load_it),
                lambda wanted: forward(stock_patcher(wanted), name))


@pytest.mark.parametrize("name", RUN)
def test_override_of_any_base(name, tmp_path):
    """Behind a MODEL of this pack and of ComfyUI's own loader; another model's is refused."""
    path, truth = file_of(name, "FP8", tmp_path / "fp8")
    plain, _ = file_of(name, "BF16", tmp_path / "bf16")
    wanted = forward(stock_patcher(truth), name)
    for base in (load(plain).patcher, stock_patcher(host_models.make(name))):
        made = model.override(base, model.Request(str(path), compute="dequantize"))
        assert common.rel_l2(forward(made.patcher, name), wanted) < (1e-5 if base.get_attachment("quantized_transformers") else 0.02)
    other = RUN[RUN.index(name) - 1]
    with pytest.raises(CheckpointError, match="the override is"):
        model.override(load(file_of(other, "BF16", tmp_path / "other")[0]).patcher, model.Request(str(path)))


@pytest.mark.parametrize("form", ["FP8", "NVFP4, ModelOpt", "ConvRot"])
@pytest.mark.parametrize("how", ["exact", "stock"])
def test_saved_and_loaded_again(how, form, tmp_path, output):
    from quantized_transformers.makers.save import save

    name = "SD3.5 M"
    loaded = load(file_of(name, form, tmp_path)[0], compute="dequantize",
                  byte_order="modelopt" if form == "NVFP4, ModelOpt" else "auto")
    before = forward(loaded.patcher, name)
    save(loaded.patcher, f"passthrough-{form.split(',')[0]}-{how}", how, True)
    saved = max(output.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    again = load(saved, compute="dequantize").patcher
    first, second = weights(loaded.patcher.model.diffusion_model), weights(again.model.diffusion_model)
    assert all(torch.equal(first[key], second[key]) for key in first) and common.rel_l2(forward(again, name), before) < 1e-5


@pytest.mark.parametrize("form", ["BF16", "FP8"])
@pytest.mark.parametrize("name", host_models.BESIDE)
def test_what_is_around_the_network(name, form, tmp_path, output):
    """It lies beside the transformer in a whole checkpoint, and is in what this pack saves."""
    from quantized_transformers.makers.save import save

    stored, truth = stored_as(name, host_models.make(name), form)
    beside, prefix = host_models.BESIDE[name], "model.model." if name.startswith("Stable Audio") else WHOLE
    whole = {key if key in beside else prefix + key: tensor for key, tensor in stored.items()}
    common.save(tmp_path, whole | {"pretransform.model.decoder.bias": torch.ones(4)}, None, None, "model.safetensors")
    with host_models.detected(name):
        loaded, expected = load(tmp_path / "model.safetensors"), stock(truth, name)
        assert "pretransform.model.decoder.bias" in loaded.report
        saved, _ = save(loaded.patcher, f"around-{form}", overwrite=True)
        for made in (loaded, load(saved)):
            same_model(made.patcher.model, expected)


def same_model(found, expected):
    """Every parameter and buffer, the noise schedule among them, and what the host takes it for."""
    numbers, wanted = weights(found), weights(expected)
    assert numbers.keys() == wanted.keys() and all(torch.allclose(numbers[key], wanted[key], rtol=2e-6, atol=1e-7) for key in wanted)
    assert model_identity(found) == model_identity(expected)


def test_a_model_that_its_file_would_not_tell(tmp_path, output):
    """Names and sizes are all that ComfyUI knows a file by: what else a MODEL has is said, another one is refused."""
    from quantized_transformers.makers.save import save

    loaded = load(file_of("SD3.5 M", "FP8", tmp_path)[0]).patcher
    loaded.model.model_config.unet_config["set_by_somebody"] = 1
    assert "the file does not tell set_by_somebody" in save(loaded, "told", overwrite=True)[1]
    loaded.model.model_config.unet_config["depth"] = 7
    with pytest.raises(CheckpointError, match="would take a file of this SD3 for a SD3 of other depth"):
        save(loaded, "another", overwrite=True)
    assert not list(output.rglob("another*"))


def test_every_model_is_saved_and_loaded_again(tiny, tmp_path, output):
    from quantized_transformers.makers.save import save

    name, tensors = tiny
    stored, _ = stored_as(name, tensors, "FP8")
    common.save(tmp_path, stored, None, host_models.metadata_of(name), "model.safetensors")
    with host_models.detected(name):
        loaded = load(tmp_path / "model.safetensors")
        same_model(load(save(loaded.patcher, "again", overwrite=True)[0]).patcher.model, loaded.patcher.model)


@pytest.mark.parametrize("name", [name for name in host_models.MODELS if host_models.metadata_of(name)])
def test_what_only_a_header_says_is_saved(name, tmp_path, output):
    """Also of a MODEL that ComfyUI's own loader made."""
    from quantized_transformers.makers.save import save

    tensors = host_models.make(name)
    loaded = load(header_file(name, tmp_path))
    for patcher in (loaded.patcher, stock_patcher(tensors, host_models.metadata_of(name))):
        save(patcher, "header", "exact", True)
        again = load(max(output.rglob("header*.safetensors"), key=lambda path: path.stat().st_mtime_ns))
        assert model_identity(again.patcher.model) == model_identity(loaded.patcher.model)


def test_what_only_a_header_tells_apart(tmp_path):
    """Wan's relatives of its very names and sizes: none overrides another, of either loader's."""
    names = ["Wan 2.1 T2V", *host_sizes.HEADERS]
    paths = {name: header_file(name, tmp_path / str(i)) for i, name in enumerate(names)}
    for name in names:
        for base in (load(paths[name]).patcher, stock_patcher(host_models.make(name), host_models.metadata_of(name))):
            for other in names:
                if other == name:
                    assert model_identity(model.override(base, model.Request(str(paths[other]))).patcher.model) == model_identity(base.model)
                else:
                    with pytest.raises(CheckpointError, match="the override is"):
                        model.override(base, model.Request(str(paths[other])))


@pytest.mark.parametrize("config", ["{}", "[1]", "no JSON", '{"transformer": {"nonsense": 1}}', '{"_class_name": "Wan"}'])
def test_a_header_of_someone_elses(config, tmp_path):
    """It says nothing to the host: the names count."""
    stored, _ = stored_as("Wan 2.1 T2V", host_models.make("Wan 2.1 T2V"), "FP8")
    common.save(tmp_path, stored, None, {"config": config}, "model.safetensors")
    assert load(tmp_path / "model.safetensors").description.architecture == "Wan"


def test_compared_weight_by_weight(tmp_path):
    from quantized_transformers.makers.compare.weights import compare_weights

    name = "SD3.5 M"
    paths = [file_of(name, form, tmp_path / str(i))[0] for i, form in enumerate(("BF16", "FP8"))]
    found = compare_weights(*[locate(str(path)) for path in paths])
    assert len(found.worst_first) > 20 and 0.01 < found.total.relative < 0.05


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "diffusion_model.", "module._orig_mod."])
def test_prefixes_and_company(prefix, tmp_path):
    """In a whole checkpoint what is beside the transformer is left out, and said, known or not."""
    name = "Wan VACE"
    whole = prefix in ("model.diffusion_model.", "model.model.", "net.")
    beside = {"vocoder.conv.weight": torch.ones(4)} if whole else {}
    beside |= {"vae.decoder.conv_in.weight": torch.ones(4, 4)} if prefix == "net." else {}
    path, truth = file_of(name, "FP8", tmp_path, prefix, beside)
    loaded = load(path, compute="dequantize")
    assert common.rel_l2(forward(loaded.patcher, name), forward(stock_patcher(truth), name)) < 1e-5
    assert ("vocoder.conv.weight" in loaded.report) is whole


@pytest.mark.parametrize("name, prefix", [("Hunyuan3D 2", "model."), ("Wan VACE", "net."), ("Stable Audio 3", "model.model.")])
def test_other_parts_of_a_whole_checkpoint(name, prefix, tmp_path):
    """By the prefixes that not many models have; the host finds its parts by the transformer's names in the file."""
    from quantized_transformers.loaders.components.whole import open_whole

    stored, truth = stored_as(name, host_models.make(name), "FP8")
    beside = host_models.BESIDE.get(name, {})
    whole = {key if key in beside else prefix + key: tensor for key, tensor in stored.items()}
    others = {f"{part}{leaf}": torch.ones(4) for part in ("vae.", "conditioner.") for leaf in ("a.bias", "b.bias")}
    path = common.save(tmp_path, whole | others, None, None, "model.safetensors") / "model.safetensors"
    loaded, expected = load(path), weights(stock(truth, name))
    found = weights(loaded.patcher.model)
    assert all(torch.allclose(found[key], expected[key], rtol=2e-6, atol=1e-7) for key in expected)
    parts = open_whole(Checkpoint(locate(str(path))))
    assert parts.parts.model == loaded.description.architecture
    assert set(parts.others) == others.keys() | beside.keys() and len(parts.shapes) == len(truth) - len(beside)


def test_names_that_the_host_renames(tmp_path):
    """Chroma's norms are `.scale` as published, which the host renames while it loads; no companion is taken for one."""
    name = "Chroma"
    stored, truth = stored_as(name, host_models.make(name), "FP8")
    as_published = {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", key): t for key, t in stored.items()}
    assert as_published.keys() != stored.keys()
    common.save(tmp_path, as_published, None, None, "model.safetensors")
    agrees(tmp_path / "model.safetensors", truth, name)


def agrees(path, given, name):
    """Load a file as stock does tensors of the same numbers: the MODEL, with its noise schedule."""
    with host_models.detected(name):
        loaded, expected = load(path).patcher.model, stock(given, name)
    same_model(loaded, expected)
    return loaded


@pytest.mark.parametrize(("marks", "prediction"), [
    ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "V_PREDICTION"),
    ({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, "EDM"),
    ({"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.01)}, "V_PREDICTION_EDM")])
def test_marks_of_another_prediction(marks, prediction, tmp_path, output):
    """Beside an SDXL UNet, and in a whole checkpoint: they go to the host, which samples otherwise, and are in what is
    saved. One that the host does not look at is refused."""
    from quantized_transformers.makers.save import save

    path, truth = file_of("SDXL", "FP8", tmp_path / "xl", beside=marks)
    assert agrees(path, truth | marks, "SDXL").model_type.name == prediction
    company = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4)}
    path, _ = file_of("SDXL", "FP8", tmp_path / "whole", WHOLE, marks | company)
    agrees(path, truth | marks, "SDXL")
    with host_models.detected("SDXL"):
        saved, _ = save(load(path).patcher, f"prediction-{prediction}", overwrite=True)
    agrees(saved, truth | marks, "SDXL")
    path, _ = file_of("SD 1.5", "FP8", tmp_path / "sd", beside=marks)
    with host_models.detected("SD 1.5"), pytest.raises(CheckpointError, match="unexpected tensors"):
        load(path)


@pytest.mark.parametrize(("scale", "prediction"), [(0.01, "EPS"), (1.0, "V_PREDICTION")])
def test_a_prediction_that_values_tell(scale, prediction, tmp_path, output):
    """Whether SD 2 predicts velocity the host guesses from a bias: no header tells it, the loaded MODEL does, in the
    report, behind a base, and saved."""
    from quantized_transformers.makers.save import save

    name, key = "SD 2", "output_blocks.11.1.transformer_blocks.0.norm1.bias"

    def write(folder, factor):
        bias = (torch.linspace(-1, 1, 64) * factor).to(torch.bfloat16).float()
        stored, truth = stored_as(name, host_models.make(name) | {key: bias}, "FP8")
        return common.save(tmp_path / folder, stored, None, None, "model.safetensors") / "model.safetensors", truth

    (path, truth), (other, _) = write("this", scale), write("other", 1.01 - scale)
    assert agrees(path, truth, name).model_type.name == prediction
    with host_models.detected(name):
        assert "prediction" not in describe(Checkpoint(locate(str(path)))).dims
        loaded = load(path)
        assert f"prediction {prediction}" in loaded.report
        request = model.Request(str(path))
        assert model.override(loaded.patcher, request).patcher.model.model_type.name == prediction
        with pytest.raises(CheckpointError, match="another SD20 than the base: prediction"):
            model.override(load(other).patcher, request)
        save(loaded.patcher, f"prediction-{prediction}", "exact", True)
        saved = max(output.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    assert agrees(saved, truth, name).model_type.name == prediction


@pytest.mark.parametrize("name", ["Stable Cascade C", "Stable Cascade B"])
def test_tensors_that_the_host_cuts(name, tmp_path):
    """Stable Cascade's q, k and v are in one as published."""
    stored, truth = stored_as(name, host_models.make(name), "BF16")
    for layer in [key.removesuffix("to_q.weight") for key in stored if key.endswith(".to_q.weight")]:
        for leaf in ("weight", "bias"):
            stored[f"{layer}in_proj_{leaf}"] = torch.cat([stored.pop(f"{layer}to_{part}.{leaf}") for part in "qkv"])
    common.save(tmp_path, stored, None, None, "model.safetensors")
    agrees(tmp_path / "model.safetensors", truth, name)


@pytest.mark.parametrize("form", ["FP8, marked", "NVFP4, marked", "ConvRot"])
def test_what_the_host_leaves_out_in_any_format(form, tmp_path):
    """The whole layer is left out, whatever belongs to it."""
    name, tensors = "HiDream-O1", host_models.make("HiDream-O1")
    stored, truth = stored_as(name, tensors, form)
    for layer in [key.removesuffix(".weight") for key in tensors if "deepstack_merger_list" in key and ".linear_fc" in key
                  and key.endswith(".weight")]:
        stored |= {f"{layer}.{leaf}": t for leaf, t in FORMS[form](tensors[f"{layer}.weight"])[0].items()}
    common.save(tmp_path, stored, None, None, "model.safetensors")
    with host_models.detected(name):
        loaded = load(tmp_path / "model.safetensors")
    expected, found = weights(stock(truth, name).diffusion_model), weights(loaded.patcher.model.diffusion_model)
    assert all(torch.allclose(found[key], expected[key], rtol=2e-6, atol=1e-7) for key in expected)
    assert "left out, as ComfyUI has no use for them" in loaded.report and "deepstack_merger_list" in loaded.report


@pytest.mark.parametrize("change", [lambda t: t[:, :-1].contiguous(), lambda t: t[:96], lambda t: t[:-1],
                                    lambda t: t.to(torch.int8)])
def test_damage_is_refused_in_what_the_host_cuts(change, tmp_path):
    """The host makes two weights of it, of whatever size and numbers."""
    stored, _ = stored_as("PixelDiT", host_models.make("PixelDiT"), "FP8")
    joined = next(key for key in stored if key.endswith("adaLN_modulation.0.weight"))
    common.save(tmp_path, stored | {joined: change(stored[joined])}, None, None, "model.safetensors")
    with host_models.detected("PixelDiT"), pytest.raises(CheckpointError):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("names", [["detector.a.weight", "tracker.b.weight"], ["something.weight", "else.weight"]])
def test_what_no_host_knows(names, tmp_path):
    common.save(tmp_path, {name: torch.ones(8, 8) for name in names}, None, None, "model.safetensors")
    with pytest.raises(CheckpointError, match="this is"):
        load(tmp_path / "model.safetensors")


def test_flux_without_its_vector_is_no_other_model(tmp_path):
    """Detection takes a FLUX.1 without vector_in for another of its kind."""
    from support import flux

    net = flux.make()
    import comfy.model_detection

    native = comfy.model_detection.convert_diffusers_mmdit(dict(net.state_dict()))
    left = {key: t for key, t in native.items() if not key.startswith("vector_in.")}
    common.save(tmp_path, left, None, None, "model.safetensors")
    with pytest.raises(CheckpointError, match="FLUX.1 without vector_in|missing tensor"):
        load(tmp_path / "model.safetensors")

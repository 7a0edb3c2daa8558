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
from support import common, host_models
from support.passthrough import (
    FORMS,
    WHOLE,
    agrees,
    file_of,
    forward,
    load,
    same_model,
    stock,
    stock_patcher,
    stored_as,
    weights,
)

pytestmark = pytest.mark.parity


# A third of them without `test full`, in every form.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.full] if at % 3 else []) for at, name in
                                        enumerate(host_models.MODELS)])
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
    found.add(comfy.supported_models.ZImage)  # all of which go by a table of ours
    assert {kind for kind in comfy.supported_models.models if kind.__name__ not in passthrough.NO_DIFFUSION} == found
    assert {kind.__name__ for kind in found} == passthrough.TRIED


# One class of forms: a weight of all its columns in one tensor, however coded. The other: two columns a byte, so that sizes
# are read otherwise, also those by which the host detects a model. Every model has two of the first and one of the second,
# in turn (each form has a dozen models or more, with and without a prefix), and BF16.
PACKED = [form for form in FORMS if form.startswith("NVFP4")]
FULL = [form for form in FORMS if form not in ("BF16", *PACKED)]


def forms_of(name):
    at = list(host_models.MODELS).index(name)
    return "BF16", FULL[at % len(FULL)], FULL[(at + 3) % len(FULL)], PACKED[at // 2 % len(PACKED)]


@pytest.mark.part(2)
def test_every_form_has_stocks_weights(tiny, tmp_path):
    name, tensors = tiny
    for i, form in enumerate(forms_of(name), list(host_models.MODELS).index(name)):
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


@pytest.mark.part(3)
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
    called = "OvisImage" if name == "Ovis-Image" else type(net.model_config).__name__  # which has FLUX.1 schnell's there
    assert table or description.architecture == called
    architecture, dims = model.base_of(SimpleNamespace(model=net))
    told = dict.fromkeys(dims, 0) | description.dims if table else description.dims  # what a table does not tell is off
    if name.startswith("SD 2"):
        told = told | {"prediction": dims["prediction"]}  # only values tell it
    assert description.architecture == architecture and dims.items() <= told.items() and not description.problems
    assert table or dims.keys() == told.keys()
    assert description.naming.style == ("diffusers" if name.startswith("Qwen-Image") else "native") and description.dims  # one style
    json.dumps(description.to_json())


@pytest.mark.part(3)
def test_every_model_is_saved_and_loaded_again(tiny, tmp_path, output):
    from quantized_transformers.makers.save import save

    name, tensors = tiny
    stored, _ = stored_as(name, tensors, "FP8")
    common.save(tmp_path, stored, None, host_models.metadata_of(name), "model.safetensors")
    with host_models.detected(name):
        loaded = load(tmp_path / "model.safetensors")
        same_model(load(save(loaded.patcher, "again", overwrite=True)[0]).patcher.model, loaded.patcher.model)


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

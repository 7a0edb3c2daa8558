"""Models by derived tables, in F32 on the CPU, against diffusers' own forward; and bases without weights."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from quantized_transformers.loaders.errors import CheckpointError
from support import common, host_models, lora
from support.derived import CASES
from support.derived_case import SIGMA
from support.passthrough import load

pytestmark = pytest.mark.parity

ALL = {", ".join(filter(None, (one.title, case.model, case.kind))): (one, case) for one in DERIVED for case in CASES[one.table]}
SIZED = host_models.FIXED | host_models.CLASSED.keys()  # of which the host knows one size
DETECTED = [name for name, (_, case) in ALL.items() if case.model not in SIZED]


def made(one, case, **more):
    """(a seeded model of diffusers in BF16, the same numbers in F32, whose buffers never were anything else)."""
    import diffusers

    name = case.kind or one.classes[0]
    if not hasattr(diffusers, name):
        assert Version(version("diffusers")) < Version("0.42"), "only older ones know fewer classes"
        pytest.skip("this diffusers has no such class")
    kind, config = getattr(diffusers, name), case.config | more
    torch.manual_seed(0)
    stored, net = common.randomise(kind(**config)), kind(**config).eval()
    net.load_state_dict(stored.state_dict())
    return stored, net


@pytest.fixture(scope="module", params=ALL)
def tiny(request, tmp_path_factory):
    """(case, folder, diffusers' model in F32)."""
    one, case = ALL[request.param]
    stored, net = made(one, case)
    folder = tmp_path_factory.mktemp("derived") / "model"
    stored.save_pretrained(folder)
    if case.model in SIZED:  # which the configuration would have to say
        (folder / "config.json").write_text(f'{{"_class_name": "{type(net).__name__}"}}', encoding="utf-8")
    return case, folder, net


def test_every_class_is_compared():
    assert {one.table for one in DERIVED} == set(CASES) and all(CASES.values())


def test_a_folder_equals_diffusers(tiny):
    case, folder, net = tiny
    given = case.inputs()
    with torch.no_grad():
        expected = case.forward(net, *given)
    with host_models.detected(case.model):
        patcher = load(folder).patcher
    found = common.apply_model(patcher, given[0], SIGMA, **case.conds(*given))
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst < 1e-5, worst
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("names", ["diffusers", "native"])
def test_a_lora_does_what_it_does_in_diffusers(tiny, names, tmp_path):
    import comfy.lora

    case, folder, net = tiny
    stored, native = case.lora
    weight, given = net.get_submodule(stored).weight, case.inputs()
    prefix, name = ("transformer.", stored) if names == "diffusers" else ("diffusion_model.", native)
    file = lora.random_lora({name: tuple(weight.shape)}, prefix)
    with host_models.detected(case.model):
        patcher = load(folder).patcher
    taken = comfy.lora.model_lora_keys_unet(patcher.model, {})
    if names == "diffusers" and not case.maps:
        assert prefix + name not in taken  # or the table of the docs is no longer true
        return
    before, delta = weight.detach().clone(), file[f"{prefix}{name}.lora_B.weight"] @ file[f"{prefix}{name}.lora_A.weight"]
    with torch.no_grad():
        plain = case.forward(net, *given)
        weight += delta
        expected = case.forward(net, *given)
        weight.copy_(before)
    found = common.apply_model(lora.load_lora(patcher, file, tmp_path), given[0], SIGMA, **case.conds(*given))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    assert (expected - plain).abs().max() / expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", DETECTED)
def test_a_deferred_base_takes_its_weights(name, tmp_path):
    one, case = ALL[name]
    stored, net = made(one, case)
    stored.save_pretrained(tmp_path / "base")
    stored.save_pretrained(tmp_path / "override")
    next((tmp_path / "base").glob("*.safetensors")).unlink()
    base = model.defer(model.Request(str(tmp_path / "base"), dtype="fp32"))
    given = case.inputs()
    with pytest.raises(CheckpointError, match="no weights yet"):
        common.apply_model(base.patcher, given[0], SIGMA, **case.conds(*given))
    loaded = model.override(base.patcher, model.Request(str(tmp_path / "override")))
    with torch.no_grad():
        expected = case.forward(net, *given)
    found = common.apply_model(loaded.patcher, given[0], SIGMA, **case.conds(*given))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    depth = next(key for key in case.config if key.startswith("num_") and key.endswith(("layers", "blocks")))
    other, _ = made(one, case, **{depth: case.config[depth] + 2})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is another|beside every so many|as many heads"):
        model.override(base.patcher, model.Request(str(tmp_path / "other")))

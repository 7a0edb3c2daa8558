"""Models by derived tables, in F32 on the CPU, against diffusers' own forward; and bases without weights."""

from __future__ import annotations

import json

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from quantized_transformers.loaders.errors import CheckpointError
from support import common, host_models, lora
from support.derived import CASES
from support.derived_case import SIGMA
from support.derived_models import ALL, made, saved
from support.passthrough import load

pytestmark = pytest.mark.parity

DETECTED = [name for name, (_, case) in ALL.items() if case.model not in host_models.OF_ONE_SIZE]


@pytest.fixture(scope="module", params=ALL)
def tiny(request, tmp_path_factory):
    """(case, folder, diffusers' model in F32)."""
    one, case = ALL[request.param]
    stored, net = made(one, case)
    folder = saved(one, case, stored, tmp_path_factory.mktemp("derived") / "pipeline") / "transformer"
    if case.model in host_models.OF_ONE_SIZE:
        for part, kind in [("transformer", net), *net.companions.items()]:
            (folder.parent / part / "config.json").write_text(f'{{"_class_name": "{type(kind).__name__}"}}', encoding="utf-8")
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


@pytest.mark.part(3)
@pytest.mark.parametrize("names", ["diffusers", "native"])
def test_a_lora_does_what_it_does_in_diffusers(tiny, names, tmp_path):
    import comfy.lora

    case, folder, net = tiny
    stored, native = case.lora
    weight, given = net.get_submodule(stored).weight, case.inputs()
    prefix, name = (case.prefix, stored) if names == "diffusers" else ("diffusion_model.", native)
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


@pytest.mark.part(3)
def test_a_lora_on_every_linear_by_our_node(tiny, tmp_path):
    """In diffusers' names, whichever the host maps: at its strength, and by the scale that its header says."""
    case, folder, net = tiny
    given, before = case.inputs(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tensors, merge_it = lora.of_every_linear(net, case.prefix)
    with host_models.detected(case.model):
        patcher = load(folder).patcher
    metadata = {"lora_adapter_metadata": json.dumps({f"{case.prefix}r": 4, f"{case.prefix}lora_alpha": 6})}
    patched, report = lora.by_our_node(patcher, tensors, tmp_path, metadata, 0.5)
    assert f"{len(tensors) // 2}" in report or "layers" in report
    assert "left away" not in report, report
    try:
        with torch.no_grad():
            plain = case.forward(net, *given)
            merge_it(0.5 * 6 / 4)
            expected = case.forward(net, *given)
    finally:
        net.load_state_dict(before)
    found = common.apply_model(patched, given[0], SIGMA, **case.conds(*given))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    assert (expected - plain).abs().max() / expected.abs().max() > 1e-3


@pytest.mark.part(2)
@pytest.mark.parametrize("name", DETECTED)
def test_a_deferred_base_takes_its_weights(name, tmp_path):
    one, case = ALL[name]
    stored, net = made(one, case)
    saved(one, case, stored, tmp_path / "base")
    saved(one, case, stored, tmp_path / "override", whole=False)  # a companion is the base's
    next((tmp_path / "base" / "transformer").glob("*.safetensors")).unlink()
    base = model.defer(model.Request(str(tmp_path / "base" / "transformer"), dtype="fp32"))
    given = case.inputs()
    with pytest.raises(CheckpointError, match="no weights yet"):
        common.apply_model(base.patcher, given[0], SIGMA, **case.conds(*given))
    loaded = model.override(base.patcher, model.Request(str(tmp_path / "override" / "transformer")))
    with torch.no_grad():
        expected = case.forward(net, *given)
    found = common.apply_model(loaded.patcher, given[0], SIGMA, **case.conds(*given))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
    depth = next(key for key in case.config if key.startswith("num_") and key.endswith(("layers", "blocks")))
    other, _ = made(one, case, **{depth: case.config[depth] + 2})
    saved(one, case, other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is another|beside every so many|as many heads"):
        model.override(base.patcher, model.Request(str(tmp_path / "other" / "transformer")))

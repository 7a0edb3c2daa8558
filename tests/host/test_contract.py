"""What this pack leans on of ComfyUI (host/contract.py): the list is whole, each line of it is asked for, and what is
gone turns off just what needs it."""

from __future__ import annotations

import ast
import importlib
import sys

import pytest
import torch

from quantized_transformers import host
from quantized_transformers.host import check, touches
from quantized_transformers.host.contract import FEATURES
from quantized_transformers.loaders import model
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.views import doctor
from support import flux
from support.pack import PACK

pytestmark = pytest.mark.unit

HOST = ("comfy", "comfy_api", "folder_paths", "server", "latent_preview")
LINES = [(feature, line) for feature, found in FEATURES.items() for line in found.touches]
# no part of ComfyUI's that could change: its version for messages, and how a program is to start it
AROUND = {"comfyui_version.__version__", "comfy.options", "comfy.options.enable_args_parsing"}


@pytest.fixture(autouse=True)
def asked_anew():
    """Sentences of the host as it is here do not outlive a test that took something of it away."""
    check._lacking.cache_clear()
    yield
    check._lacking.cache_clear()
    check.found_lacks.clear()


def leaned_on() -> set[str]:
    """Dotted names of the host in the code of this pack, by its imports."""
    names = set()
    for path in [*(PACK / "host").glob("*.py"), *(PACK / "nodes").glob("*.py"), *(PACK / "quant").rglob("*.py"),
                 PACK / "__init__.py", PACK / "__main__.py"]:
        modules: dict[str, str] = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else
                            alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            parts, held = [], node
            while isinstance(held, ast.Attribute):
                parts.append(held.attr)
                held = held.value
            if parts and isinstance(held, ast.Name) and held.id in modules:
                names.add(".".join((modules[held.id], *parts[::-1])))
    return {name for name in names if name.split(".")[0] in (*HOST, "comfy_kitchen", "comfyui_version")}


def test_everything_that_is_leaned_on_is_declared():
    declared = {touches.parse(line).name for _, line in LINES}
    packages = {name.rpartition(".")[0] for name in declared} | {touches.parse(line).module for _, line in LINES}
    undeclared = sorted(
        name for name in leaned_on() - AROUND
        if name not in declared and not any(package == name or package.startswith(f"{name}.") for package in packages)
        and not any(name.startswith(f"{one}.") for one in declared))
    assert not undeclared
    assert {"comfy.sd.load_diffusion_model_state_dict", "comfy_kitchen.tensor.QuantizedTensor"} <= leaned_on()


def test_this_host_has_it_all():
    assert host.all_lacks() == {} and check.found_lacks == []
    assert doctor.facts()["ComfyUI's parts"] == "all that this pack uses are there"


class Bare:
    """Stands where a class was, without what that had."""


def take_away(touch: touches.Touch, monkeypatch) -> None:
    held = importlib.import_module(touch.module)
    if touch.maker:
        monkeypatch.setattr(held, touch.maker, lambda: type("Operations", (), {"Linear": Bare}))
        return
    parent, owner = held, ""
    for owner in touch.path if touch.attribute else touch.path[:-1]:
        parent, held = held, getattr(held, owner)
    bases = held.__mro__[1:] if isinstance(held, type) else ()
    if not touch.attribute and touch.path[-1] in vars(held) and not any(hasattr(b, touch.path[-1]) for b in bases):
        monkeypatch.delattr(held, touch.path[-1])
    else:  # of what instances have, or inherited
        monkeypatch.setattr(parent, owner, Bare)


@pytest.mark.parametrize("feature, line", [pair for pair in LINES if not pair[1].endswith(" ?")],
                         ids=lambda value: value.partition("(")[0])
def test_each_taken_away(feature, line, monkeypatch, caplog):
    touch = touches.parse(line)
    if touch.module == "server":  # asked in a server only
        assert touches.problem(touch) == ""
        monkeypatch.setitem(sys.modules, "server", type(sys)("server"))
        assert touches.problem(touch) == touch.name
        return
    assert touches.problem(touch) == ""
    take_away(touch, monkeypatch)
    assert touch.name in touches.problem(touch) or touch.module in touches.problem(touch)
    with pytest.raises(host.HostChanged) as error:
        check.require(feature)
    assert error.value.what.startswith(f"ComfyUI {host.version()} lacks ")
    assert error.value.what.endswith(FEATURES[feature].stops) and "update this pack" in error.value.do
    assert sum(FEATURES[feature].stops in record.getMessage() for record in caplog.records) == 1
    for other, contract in FEATURES.items():  # and nothing else is turned off
        if not any(touches.problem(touches.parse(one)) for one in contract.touches if not one.endswith(" ?")):
            check.require(other)


@pytest.mark.parametrize("line", [line for _, line in LINES if "(" in line.replace("()>", "") and "server" not in line],
                         ids=lambda line: line.partition("(")[0])
def test_each_called_otherwise(line, monkeypatch):
    touch = touches.parse(line)
    assert touch.call is not None
    if touches.problem(touch) or touch.optional and not hasattr(importlib.import_module(touch.module), touch.path[0]):
        return

    def other(*, an_argument_that_we_do_not_give):
        raise AssertionError

    if touch.maker:
        made = {touch.path[0]: type(touch.path[0], (), {touch.path[-1]: other})}
        monkeypatch.setattr(importlib.import_module(touch.module), touch.maker, lambda: type("Operations", (), made))
    else:
        held = importlib.import_module(touch.module)
        for owner in touch.path[:-1]:
            held = getattr(held, owner)
        monkeypatch.setattr(held, touch.path[-1], other)
    assert touches.problem(touch).startswith(f"{touch.name}(")


# what a load of an FP8 transformer needs; without anything else it must work
NEEDED = {"devices", "transformers", "quantized layers"}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_rest_of_the_pack_works(feature, tiny, monkeypatch):
    real = touches.problem
    lines = {touches.parse(line) for line in FEATURES[feature].touches}
    shared = {touches.parse(line) for other in NEEDED - {feature} for line in FEATURES[other].touches}
    monkeypatch.setattr(touches, "problem", lambda touch: touch.name if touch in lines - shared else real(touch))
    request = model.Request(str(tiny.fp8))
    if feature in NEEDED:
        with pytest.raises(CheckpointError, match="lacks .*: .*"):
            model.load(request, quiet=True)
        return
    loaded = model.load(request, quiet=True)
    assert torch.isfinite(flux.comfy_velocity(loaded.patcher, **flux.inputs())).all()
    assert list(host.all_lacks())[:1] == [feature] or feature in host.all_lacks()
    assert FEATURES[feature].stops in " ".join(doctor.facts()["ComfyUI's parts"])
    assert FEATURES[feature].stops in model.load(request, quiet=True).report


def test_without_memory_estimates_badges_say_the_rest(tiny, monkeypatch):
    import comfy.model_management

    from quantized_transformers.loaders.queries import Query
    from quantized_transformers.views.card import card, judged

    before = judged(card(Query(str(tiny.fp8))))
    monkeypatch.delattr(comfy.model_management, "unet_dtype")
    check._lacking.cache_clear()
    assert judged(card(Query(str(tiny.fp8)))) == {**before, "vram": 0} and before["vram"] > 0


def test_without_matmul_switches_layers_count_as_emulated(monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device: True)
    assert host.has_matmul("FP8")
    monkeypatch.delattr(comfy.model_management, "supports_fp8_compute")
    assert not host.has_matmul("FP8") and FEATURES["matmuls"].stops in check.lacking("matmuls")


def test_dynamic_vram_needs_a_gpu(monkeypatch):
    """comfy-aimdo itself says that it has nothing to manage here, and models are then loaded as they were."""
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    before = comfy.model_patcher.CoreModelPatcher
    assert not host.start_dynamic_vram()  # --cpu
    monkeypatch.setattr(comfy.cli_args, "enables_dynamic_vram", lambda: True)
    monkeypatch.setattr(comfy.model_management, "is_nvidia", lambda: True)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda: [torch.device("cuda", 0)])
    assert not host.start_dynamic_vram()
    assert comfy.model_patcher.CoreModelPatcher is before and not comfy.memory_management.aimdo_enabled

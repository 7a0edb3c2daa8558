"""What holds for every architecture in NVFP4: exact weights, the forward, views, and LoRA by the host's own node."""

from __future__ import annotations

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures import ARCHITECTURES, Naming
from support import common
from support import lora as lora_tools
from support.families import FAMILIES

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, real NVFP4 export, loaded model); the host's width shim is on while the tests of a family run."""
    family = FAMILIES[request.param]
    with family.ready():
        folder = family.export(tmp_path_factory.mktemp(request.param) / "nvfp4", "NVFP4")
        yield family, folder, model.load(model.Request(str(folder)), quiet=True)


def modules_of(loaded):
    architecture = next(a for a in ARCHITECTURES if a.name == loaded.description.architecture)
    return list(architecture.modules(loaded.description.dims, Naming("diffusers")))


def test_weights_are_the_stored_bytes_exactly(case):
    """By rows of the name map, which the tests of each architecture hold against diffusers' converters."""
    family, folder, loaded = case
    exact = common.dequantize(common.stored(folder))
    quantized = 0
    for module in modules_of(loaded):
        if not module.linear:
            continue
        weight = loaded.patcher.get_model_object(f"diffusion_model.{module.native}").weight
        expected = torch.cat([exact[f"{name}.weight"] for name in module.stored])
        if module.swap_halves:
            expected = torch.cat(expected.chunk(2)[::-1])
        assert torch.equal(weight.dequantize() if hasattr(weight, "_qdata") else weight, expected), module.native
        quantized += hasattr(weight, "_qdata")
    assert quantized > 10 and loaded.description.family == "modelopt-nvfp4"


def test_forward_equals_dequantized_weights(case):
    family, folder, loaded = case
    expected = family.reference(common.dequantize(common.stored(folder)), common.config_of(folder))
    assert common.rel_l2(family.run(loaded.patcher), expected) < 1e-5


def test_an_override_of_a_deferred_base(case):
    family, folder, loaded = case
    base = model.defer(model.Request(str(folder))).patcher
    for kind in ("component", "weights"):
        result = model.override(base, model.Request(str(folder)), kind).patcher
        assert torch.equal(family.run(result), family.run(loaded.patcher))


def test_lora(case, tmp_path):
    """On every fused module and some others: in low-VRAM mode exactly W + B A, fully loaded the same effect."""
    family, folder, loaded = case
    targets = [m for m in modules_of(loaded) if m.linear and len(m.stored) > 1][:4]
    targets += [m for m in modules_of(loaded) if m.linear and len(m.stored) == 1 and ".0." in m.native][:4]
    g = torch.Generator().manual_seed(5)
    exact, lora = common.dequantize(common.stored(folder)), {}
    for module in targets:
        rows, columns = sum(module.rows), module.inner[0]
        a = torch.randn(8, columns, generator=g) * columns ** -0.5
        b = torch.randn(rows, 8, generator=g) * 8 ** -0.5
        lora |= {f"diffusion_model.{module.native}.lora_A.weight": a, f"diffusion_model.{module.native}.lora_B.weight": b}
        for name, part in zip(module.stored, (b @ a).split(list(module.rows)), strict=True):
            exact[f"{name}.weight"] = exact[f"{name}.weight"] + part
    patched = lora_tools.load_lora(loaded.patcher, lora, tmp_path)
    assert len(patched.patches) == len(targets)
    before = family.run(loaded.patcher)
    expected = family.reference(exact, common.config_of(folder))

    low = lora_tools.low_vram(patched, lambda p: family.run(p, load=False))
    assert common.rel_l2(low, expected) < 1e-5
    effect, full = expected - before, family.run(patched) - before
    assert effect.norm() > 0.05 * before.norm()
    # requantized to four bits: a step is up to a sixth of a block's largest weight, so only the effect as a whole agrees
    assert abs(float(full.norm() / effect.norm()) - 1) < 0.1
    assert torch.nn.functional.cosine_similarity(full.flatten(), effect.flatten(), 0) > 0.9
    assert torch.equal(family.run(loaded.patcher), before)

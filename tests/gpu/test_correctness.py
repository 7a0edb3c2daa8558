"""Stage 2 finds what it is there for: a kernel whose scale, rows, tail, rounding or weight is wrong does not pass."""

from __future__ import annotations

import pytest
import torch

from gpu import correctness, layers, machine
from gpu.layers import Arm

pytestmark = pytest.mark.unit

WHERE = machine.Where(torch.device("cpu"), machine.TINY, "")
ARMS = [Arm("fp8"), Arm("fp8", "tiles", ""), Arm("fp8", "shards", ""), Arm("nvfp4"), Arm("svdq_int4", "tiles", ""),
        Arm("w8a8_dynamic", "tiles", "reference")]
FAULTS = {
    "rows": lambda out: out.roll(1, dims=-1),
    "scale": lambda out: out * 1.3,  # NVFP4's rounding of activations takes up to a fifth
    "tail": lambda out: out if len(out) == 1 else torch.cat([out[:-1], torch.full_like(out[-1:], float("nan"))]),
}


@pytest.fixture
def broken(monkeypatch):
    """Let every layer's output go through `fault(module, output)`."""
    true = layers.linear

    def through(fault):
        def linear(*args):
            module = true(*args)
            module.register_forward_hook(lambda module, _, out: fault(module, out))
            return module

        monkeypatch.setattr(layers, "linear", linear)

    return through


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_right_ones_pass(arm):
    found = correctness.check(arm, WHERE)
    assert found["ok"], found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_wrong_ones_do_not(broken, arm, fault):
    broken(lambda _, out: FAULTS[fault](out))
    found = correctness.check(arm, WHERE)
    assert not found["ok"], found


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.key)
def test_nor_what_rounds_by_another_rule(broken, arm):
    """Well within the noise of a format, and not within that of plain torch by the same rules."""
    calls = []

    def fault(_, out):
        calls.append(1)  # the kernel comes first, plain torch second
        return out * 1.012 if len(calls) % 2 else out

    broken(fault)
    found = correctness.check(arm, WHERE)
    assert found["eager"] > correctness.EAGER and not found["ok"], found


def test_nor_what_writes_into_its_weight(broken):
    def fault(module, out):
        module.weight._qdata.view(torch.uint8)[-1, -1] += 1

    broken(fault)
    found = correctness.check(Arm("fp8"), WHERE)
    assert not found["untouched"] and not found["ok"], found


def test_another_dtype_is_an_error(broken):
    broken(lambda _, out: out.to(torch.float16))
    with pytest.raises(ValueError, match="rows give torch.float16"):
        correctness.check(Arm("fp8"), WHERE)

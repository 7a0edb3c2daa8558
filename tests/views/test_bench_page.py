"""The page of `bench` for what this machine is not: a GPU that waits for its CPU, or is too small."""

from __future__ import annotations

import pytest

from quantized_transformers.loaders.architectures.base import Inputs
from quantized_transformers.makers.bench.measure import Measured
from quantized_transformers.makers.bench.run import Run
from quantized_transformers.views.bench_page import page, to_json

pytestmark = pytest.mark.unit

FACTS = {"this pack": "0.1.0", "device": "NVIDIA H100", "device type": "cuda", "kitchen": {"cuda": "available, 9 functions"},
         "HIP": "", "nunchaku": "not installed", "families": []}


def made(name="owner/fp8", step=0.1, launch=0.02, held=12_000_000_000, total=12_000_000_000, peak=15_000_000_000, load=4.0):
    measured = Measured((step * 0.9, step, step * 1.3), (launch,) * 3, held, peak)
    return Run(name, "what the load said", "bfloat16", load, 1.5, measured, (held, total),
               (("gemm" * 40, 0.06, 19), ("copy", 0.02, 7)), (1, 16, 128, 128), 4096, Inputs((256, 4096), 768))


def written(*runs):
    return page(runs, FACTS, "euler", "2026-11-28")


def test_a_gpu():
    text = written(made(), made("owner/bf16", step=0.25, held=24_000_000_000, total=24_000_000_000, peak=30_000_000_000, load=8.0))
    assert text.startswith("# owner/fp8, 2026-11-28\n") and "kitchen: cuda: available, 9 functions" in text
    assert "step: 0.1000 s (0.0900 to 0.1300, 3 steps)" in text
    assert "launch: 0.0200 s of a step until the CPU has handed it over, 20 %: the GPU limits it" in text
    assert "memory of the device: 12.00 GB of 12.00 GB of weights, peak 15.00 GB" in text
    ratios = text[text.index("## against its base owner/bf16"):].splitlines()[1:5]
    assert ratios == ["step: 0.40x", "weights: 0.50x", "peak memory: 0.50x", "load: 0.50x"]
    assert "0.06000  75.0%     19  " + "gemm" * 22 + "g…" in text and "0.02000  25.0%      7  copy" in text
    for part in ("CPU;", "not all weights", "HIP", "nunchaku"):
        assert part not in text


def test_a_gpu_that_waits_and_one_that_is_too_small():
    text = written(made(launch=0.095, held=6_000_000_000))
    assert "95 %: the CPU is what limits it, not the GPU" in text
    assert "6.00 GB of 12.00 GB of weights" in text and "note: not all weights fit on the device" in text


def test_json_has_every_kernel():
    found = to_json([made()], FACTS, "euler", "2026-11-28")
    assert found["base"] is None and len(found["model"]["kernels"]) == 2 and found["model"]["takes"]["text"] == (256, 4096)
    assert found["machine"] == {key: FACTS[key] for key in ("this pack", "device", "HIP", "kitchen", "nunchaku", "device type")}

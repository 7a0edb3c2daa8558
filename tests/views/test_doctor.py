"""`doctor`: what it says of machines that these tests do not run on, and of packages that are not what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from quantized_transformers.host import Machine
from quantized_transformers.quant.kernels import choose, nunchaku_wheel
from quantized_transformers.quant.kernels.torch_npu import OPS, DeviceFacts
from quantized_transformers.views import verdict
from quantized_transformers.views.doctor import lines
from support.pack import PACK

pytestmark = pytest.mark.host

NPU = frozenset(OPS)


def test_an_impostor_and_a_line_for_each_family(tmp_path):
    """PyPI's nunchaku is a statistics library (docs/sources/nunchaku.md, "The package on PyPI")."""
    (tmp_path / "nunchaku").mkdir()
    (tmp_path / "nunchaku" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "nunchaku-0.16.1.dist-info").mkdir()
    (tmp_path / "nunchaku-0.16.1.dist-info" / "METADATA").write_text("Name: nunchaku\nVersion: 0.16.1\n",
                                                                     encoding="utf-8")
    done = subprocess.run([sys.executable, str(PACK), "doctor", "--json"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout[done.stdout.index("{"):])
    assert "0.16.1" in facts["nunchaku"] and "statistics library" in facts["nunchaku"]
    assert facts["device"] == "cpu" and facts["kitchen"]["eager"].startswith("available")
    assert facts["torch_npu"] == facts["flashinfer"] == "not installed"
    assert (facts["triton"] == "not installed") is (find_spec("triton") is None)
    levels = {row["family"]: row["verdict"] for row in facts["families"]}
    assert levels.pop("BF16, F16, F32") == "green" and set(levels.values()) == {"amber"} and len(levels) == 24
    text = lines(facts)
    assert any("statistics library" in line for line in text) and text[-1].startswith("green  BF16, F16, F32")


GREEN, AMBER = "green", "amber"
MACHINES = {
    # type, SM, kinds with a native matmul of the host, NPU -> format: (colour, words)
    "RTX 4090": ("cuda", (8, 9), {"FP8", "INT8"}, None, {
        "FP8": (GREEN, "native FP8"), "NVFP4": (AMBER, "it has no NVFP4 matmul"), "SVDQ INT4": (GREEN, "fast on SM 8.9"),
        "SVDQ NVFP4": (AMBER, "dequantize"), "W8A8_DYNAMIC": (GREEN, "native INT8"), "AWQ INT4": (GREEN, "fast on SM 8.9"),
        "W4A4_DYNAMIC": (AMBER, "INT8 arithmetic"), "MXFP8": (AMBER, "emulated")}),
    "B200": ("cuda", (10, 0), {"FP8", "NVFP4", "MXFP8", "INT8"}, None, {
        "FP8": (GREEN, "native"), "NVFP4": (GREEN, "native"), "SVDQ NVFP4": (GREEN, "fast on SM 10.0"),
        "W8A8_MXFP8": (GREEN, "native"), "W4A4_MXFP4": (AMBER, "emulated")}),
    "Apple M4": ("mps", None, set(), None, {  # newer hosts have INT8 off there
        "W8A8_DYNAMIC": (AMBER, "emulated (weights dequantized), because ComfyUI has INT8 off"),
        "INT8": (AMBER, "because ComfyUI has INT8 off"), "W8A8": (AMBER, "in INT8 arithmetic without fast kernels")}),
    "Ascend A5": ("npu", None, set(), DeviceFacts(True, "A5", "8.5.0", "2.14", "", NPU), {
        "FP8": (AMBER, "it has no FP8 matmul"), "W8A8_MXFP8": (GREEN, "torch_npu 2.14 on Ascend A5"),
        "W4A4_DYNAMIC": (AMBER, "plain torch"), "MXFP8": (GREEN, "torch_npu")}),
    "Ascend A2": ("npu", None, set(), DeviceFacts(True, "A2", "8.0.RC2", "2.14", "", NPU), {
        "W8A8": (GREEN, "torch_npu"), "W4A4_DYNAMIC": (GREEN, "torch_npu"), "W8A8_MXFP8": (AMBER, "plain torch")}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_other_machines(machine, monkeypatch):
    """Given what the host says of a device, each family gets the colour that README's tables promise."""
    kind, capability, native, facts, expected = MACHINES[machine]
    found = {"torch_npu": facts or DeviceFacts(), "nunchaku": nunchaku_wheel.Wheel("", "nunchaku is not installed.")}
    monkeypatch.setattr(choose, "here", lambda codecs: Machine(kind, machine, capability, matmuls=frozenset(native), found=found))
    verdict.of_codecs.cache_clear()
    try:
        found = dict(verdict.families())
        for name, (level, words) in expected.items():
            assert found[name].level == level and words in found[name].text, (name, found[name])
    finally:
        verdict.of_codecs.cache_clear()

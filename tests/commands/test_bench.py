"""`bench`: the page that a user sends on, its JSON, and what it refuses before any work."""

from __future__ import annotations

import json
import re

import pytest
from commands.test_cli import run

from support.flux import config_of

pytestmark = [pytest.mark.host, pytest.mark.full]

SMALL = ("--size", "96x64", "--steps", "3")


def test_a_page(tiny, tmp_path):
    trace = tmp_path / "trace.json"
    done = run("bench", tiny.fp8, "--base", tiny.bf16, *SMALL, "--trace", trace)
    assert done.returncode == 0, done.stderr[-2000:]
    text = done.stdout[done.stdout.index("# "):]
    assert re.match(rf"# {re.escape(str(tiny.fp8))}, \d{{4}}-\d\d-\d\d \d\d:\d\d ", text)
    for part in ("this pack: 0.", "ComfyUI: ", "torch: 2.", "latent [1, 16, 8, 12], 24 tokens and 256 of text x 64", "96 x 64",
                 "this is a CPU", "layers: 47 FP8, 3 BF16", "FP8 runs: dequantize", "## base: ", "## against its base ",
                 " aten::index_select", " aten::addmm"):
        assert part in text, part
    assert len(re.findall(r"^step: \d+\.\d{4} s \(.*, 3 steps\)$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^(?:step|load|weights): \d+\.\d\dx$", text, re.MULTILINE)) == 3
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_as_json(tiny):
    done = run("bench", tiny.fp8, *SMALL, "--compute", "dequantize", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{"):])
    own = found["model"]
    assert found["base"] is None and own["reference"] == str(tiny.fp8) and len(own["measured"]["steps"]) == 3
    assert own["latent"] == [1, 16, 8, 12] and own["takes"]["pooled"] == config_of(tiny.fp8)["pooled_projection_dim"]
    assert {name: calls for name, _, calls in own["kernels"]}["aten::index_select"] >= 47  # decoded, one or more a layer
    assert found["machine"]["device type"] == "cpu"


def test_what_is_wrong_is_said_before_any_work(tiny, tmp_path):
    done = run("bench", tiny.fp8, "--trace", tmp_path / "nowhere" / "trace.json")
    assert done.returncode == 1 and "the folder for the trace does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    for option, value in (("--size", "64"), ("--steps", "0"), ("--frames", "-1")):
        done = run("bench", tiny.fp8, option, value)
        assert done.returncode == 2 and f"argument {option}" in done.stderr
    done = run("bench", tiny.fp8, *SMALL, "--backend", "no such kernel")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr

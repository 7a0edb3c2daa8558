"""`gpu-table` on a CPU: every stage runs, and what breaks one row takes no other along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_table
import pytest
import torch

from gpu import layers, machine, other_models
from gpu.models import ARMS
from gpu.rows import Rows, read
from quantized_transformers.quant.codecs import codecs
from quantized_transformers.quant.kernels import kernels

pytestmark = pytest.mark.host

TABLE = Path(__file__).resolve().parents[1] / "gpu_table.py"
WHERE = machine.Where(torch.device("cpu"), machine.TINY, "estimates")
# It starts ten processes, and needs of torch one name.
BREAKING = '''
import contextlib, os, signal, sys, time, types
sys.path.insert(0, {tests!r})
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].inference_mode = contextlib.nullcontext
import gpu_table

def stage(limit, **rows):
    module = types.ModuleType("stage")
    module.LIMIT = limit
    module.run = lambda into, where: [into.measure(key, work) for key, work in rows.items()]
    return module

def raises():
    raise ValueError("as it is\\nmore of it")

def spoils():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

right = lambda: {{"x": 1}}
sys.modules |= {{
    "gpu.breaking": stage(60, first=right, killed=lambda: os.kill(os.getpid(), signal.SIGSEGV), raised=raises,
                          spoiled=spoils, last=right),
    "gpu.hanging": stage(3, first=right, hung=lambda: time.sleep(600), never=right),
    "gpu.fine": stage(60, only=right)}}
gpu_table.__file__ = __file__
gpu_table.STAGES = {{0: "fine", 1: "breaking", 2: "hanging", 3: "fine"}}
gpu_table.machine.start = lambda *_: None
sys.exit(gpu_table.main())
'''


def table(out: Path, *options: str, script: Path = TABLE) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), "--out", str(out), "--cpu", *options], capture_output=True, text=True,
                          check=False)


def in_this_process(monkeypatch, out: Path, *options: str) -> int:
    """Its `main`, which needs ComfyUI no more than the processes do that it starts: these alone have to import it."""
    monkeypatch.setattr(sys, "argv", [str(TABLE), "--out", str(out), "--cpu", *options])
    return gpu_table.main()


@pytest.mark.full
def test_every_stage(tmp_path, monkeypatch, capfd):
    """All rows are there, none with an error, every kernel and codec among them; and none is measured twice."""
    import comfy.cli_args as cli_args

    out = tmp_path / "new" / "rows.jsonl"
    # Those that need no switch of ComfyUI's as the process of theirs does it, which test_kit.py starts for two of them.
    # 13 is 12 with another switch, which ComfyUI knows.
    code = in_this_process(monkeypatch, out, "--tiny", "--one", "--stage", *map(str, range(12)))
    code = code or in_this_process(monkeypatch, out, "--tiny", "--stage", "12", "14")
    assert gpu_table.STAGES[12] == gpu_table.STAGES[13] and cli_args.parser.parse_args(gpu_table.SWITCHES[13])
    rows = {(row["stage"], row["key"]): row for row in read(out)}
    assert not {key: row["error"] for key, row in rows.items() if "error" in row} and code == 0, capfd.readouterr()
    by_stage = {stage: {key: row for (at, key), row in rows.items() if at == stage} for stage in (*range(13), 14)}
    assert all(by_stage.values())
    assert all("0 of" not in row["report"] for key, row in by_stage[14].items() if key.endswith(", kept"))
    correct = by_stage[2]
    wanted = {name for name in codecs() if not name.startswith("ggml_")} | set(layers.GGML)
    assert {key.split()[0] for key in correct} - {"bf16"} == wanted - {"plain"}
    runnable = {kernel.name for kernel in kernels() if not kernel.device}
    assert {key.split()[2] for key in correct if key != "bf16"} >= (runnable & {"comfy_kitchen", "reference"}) | {"dequantize", "host"}
    assert all(row["ok"] and row["finite"] and row["untouched"] for row in correct.values())
    assert set(by_stage[4]) == set(ARMS) and all(len(row["steps"]) == 1 for row in by_stage[4].values())
    assert all(row["patched"] == row["layers"] > 10 for row in by_stage[6].values())
    assert {row["vram"] for stage in (11, 12) for row in by_stage[stage].values()} == {
        "estimates", "estimates --disable-dynamic-vram"}
    assert by_stage[10]["fp8"]["psnr"] > by_stage[10]["fp8"]["bound"]

    before = out.read_bytes()
    for stage in range(12):
        gpu_table.of(stage).run(Rows(out, stage, skip_done=True), WHERE)
    assert out.read_bytes() == before


def test_what_breaks_takes_nothing_along(tmp_path):
    script, out = tmp_path / "table.py", tmp_path / "rows.jsonl"
    script.write_text(BREAKING.format(tests=str(TABLE.parent)), encoding="utf-8")
    done = table(out, script=script)
    rows = {(row["stage"], row["key"]): row for row in read(out)}
    assert done.returncode == 1 and all("begin" not in row for row in rows.values())
    assert {key: row.get("error", "") for key, row in rows.items()} == {
        (0, "only"): "", (1, "first"): "", (1, "killed"): "the process ended with -11", (1, "raised"): "as it is",
        (1, "spoiled"): "CUDA error: an illegal memory access was encountered", (1, "last"): "",
        (2, "first"): "", (2, "hung"): "the process ended with out of time", (3, "only"): ""}
    assert "raise ValueError" in rows[1, "raised"]["trace"]
    assert "ended with -11: killed" in done.stdout

    before = out.read_bytes()
    done = table(out, "--skip-done", "--stage", "3", script=script)
    assert done.returncode == 0 and out.read_bytes() == before


def test_nothing_goes_on_without_imports(tmp_path, monkeypatch, capfd):
    """A machine that cannot import ComfyUI's loader says so, and tries nothing else."""
    (tmp_path / "torchsde.py").write_text("raise ImportError('no torchsde here')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "rows.jsonl"
    assert in_this_process(monkeypatch, out, "--stage", "0", "1") == 1
    assert "nothing else is tried" in capfd.readouterr().out
    rows = {(row["stage"], row["key"]): row for row in read(out)}
    assert "no torchsde here" in rows[0, "imports"]["error"] and {stage for stage, _ in rows} == {0}


def test_a_line_that_was_cut_off(tmp_path):
    """As where a machine is taken away while it writes; what was begun last is what remains of its row."""
    out = tmp_path / "rows.jsonl"
    rows = Rows(out, 3)
    rows.measure("whole", lambda: {"x": 1})
    rows.write("begun", begin=True)
    with out.open("a", encoding="utf-8") as file:
        file.write('{"stage": 3, "key": "beg')
    assert [(row["key"], row.get("begin", False)) for row in read(out)] == [("whole", False), ("begun", True)]


def test_what_stage_2_found_wrong_is_not_timed(tmp_path):
    out = tmp_path / "rows.jsonl"
    for key, found in {"fp8 host host": {"ok": True}, "nvfp4 host host": {"ok": False}, "int8": {"error": "it raised"}}.items():
        Rows(out, 2).write(key, arm=key, **found)
    rows = Rows(out, 3)
    assert rows.failed("fp8 host host") == rows.failed("never seen") == ""
    assert rows.failed("nvfp4 host host") == "wrong numbers at nvfp4 host host" and rows.failed("int8") == "it raised"
    out.write_text("", encoding="utf-8")
    for key in (layers.Arm("nvfp4").key, layers.Arm("nvfp4", "tiles", "").key):
        Rows(out, 2).write(key, arm=key, ok=False)
    other_models.run(Rows(out, 9), WHERE)
    found = {row["key"]: row.get("error", "") for row in read(out) if row["stage"] == 9}
    assert len(found) == 8 and {key for key, error in found.items() if error.startswith("not timed: ")} == {
        "Wan, nvfp4", "Qwen-Image, nvfp4"}

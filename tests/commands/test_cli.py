"""The command line: the same code without a server."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from support import flux
from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.host


def run(*arguments: object, comfyui: bool = True) -> subprocess.CompletedProcess:
    environment = dict(os.environ)
    if not comfyui:
        environment.pop("COMFYUI_PATH", None)
    return subprocess.run([sys.executable, str(PACK), *map(str, arguments)], capture_output=True, text=True,
                          env=environment, check=False)


def test_inspect(tiny):
    done = run("inspect", tiny.fp8)
    assert done.returncode == 0 and "47 FP8, 3 BF16" in done.stdout and "this checkpoint loads" in done.stdout


def test_inspect_needs_neither_torch_nor_comfyui(tiny):
    script = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['qt', 'inspect', sys.argv[1], '--json']; "
              f"runpy.run_path({str(PACK)!r}, run_name='__main__')")
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"}
    done = subprocess.run([sys.executable, "-c", script, str(tiny.mixed)], capture_output=True, text=True,
                          env=environment, check=False)
    assert done.returncode == 0, done.stderr
    description = json.loads(done.stdout)
    tensors = flux.stored(tiny.mixed)
    fp8 = {name.removesuffix(".weight") for name, t in tensors.items() if t.dtype.itemsize == 1}
    assert {name for name, fmt in description["layers"].items() if fmt == "FP8"} == fp8
    assert description["family"] == "modelopt-fp8" and description["problems"] == []


def test_inspect_lists_problems(tiny, tmp_path):
    tensors = flux.stored(tiny.fp8)
    del tensors["proj_out.bias"], tensors["norm_out.linear.weight_scale"]
    done = run("inspect", flux.save(tmp_path, tensors, flux.config_of(tiny.fp8)))
    assert done.returncode == 1 and "PROBLEM: missing tensor proj_out.bias" in done.stdout
    assert "PROBLEM: norm_out.linear: FP8 weight without weight_scale" in done.stdout


def test_load(tiny):
    done = run("load", tiny.pipeline, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout[done.stdout.index("{"):])["architecture"] == "FLUX.1"


def test_errors_are_one_message(tmp_path):
    done = run("load", tmp_path / "nothing")
    assert done.returncode == 1 and done.stderr.rstrip().splitlines()[-3].startswith("error: there is no such file")
    assert "Traceback" not in done.stderr
    done = run("load", tmp_path, comfyui=False)
    assert done.returncode == 1 and "set COMFYUI_PATH" in done.stderr


def test_doctor():
    for comfyui in (True, False):
        done = run("doctor", "--json", comfyui=comfyui)
        assert done.returncode == 0, done.stderr[-2000:]
        facts = json.loads(done.stdout[done.stdout.index("{"):])
        version = runpy.run_path(str(COMFYUI / "comfyui_version.py"))["__version__"]
        assert facts["ComfyUI"] == (version if comfyui else "not found")
        assert facts["torch"].startswith("2.")


def test_reports_and_errors_are_in_the_language_of_qt_lang(tmp_path, monkeypatch):
    monkeypatch.setenv("QT_LANG", "zh")
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps({"1": {"class_type": "NunchakuPulidApply", "inputs": {}}}), encoding="utf-8")
    done = run("migrate", workflow)
    assert done.returncode == 0 and "节点 1 NunchakuPulidApply：此版本没有与之对应的节点" in done.stdout, done.stderr
    workflow.write_text("{}", encoding="utf-8")
    done = run("migrate", workflow)
    assert done.returncode == 1 and "这不是工作流" in done.stderr

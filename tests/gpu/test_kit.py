"""`gpu-kit`: what is in it is enough to measure with, and more than fits is refused. (The wheels need a package index.)"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import gpu_kit
import pytest

from gpu.rows import read

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "kit"
    folder.mkdir()
    gpu_kit.fill(folder, preset=0)
    return folder


@pytest.mark.full
def test_it_measures_from_its_own_files_alone(kit, tmp_path):
    """start.sh as on the bare machine, with what is installed here in place of the wheels: ComfyUI and the pack are the
    kit's, and PyAV the stand-in."""
    home = tmp_path / "home"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COMFYUI_PATH", "OUT")}
    wheel = kit / "nothing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("nothing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n")
        made.writestr("nothing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n")
        made.writestr("nothing-1.0.dist-info/RECORD", "")
    start = ["bash", str(kit / "start.sh"), "0", "2"]
    environment |= {"QT_GPU_HOME": str(home), "PYTHON": sys.executable, "TABLE_OPTIONS": "--cpu --tiny"}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(read(home / "out" / "gpu-table.jsonl"))
    versions, = (row for row in rows if row["key"] == "versions")
    assert versions["pack"] == gpu_kit.revision() and sum(row["stage"] == 2 for row in rows) > 40
    probe = ("import sys; sys.path.insert(0, sys.argv[1]); from support.pack import start_comfy; start_comfy(); "
             "from importlib.util import find_spec; print(*(find_spec(name).origin for name in "
             "('av', 'nodes', 'comfy.sd', 'quantized_transformers')))")
    found = subprocess.run([sys.executable, "-c", probe, str(home / "pack" / "tests")], capture_output=True, text=True, check=True, env={
        **environment, "PYTHONPATH": f"{home / 'site'}:{kit / 'stub'}", "COMFYUI_PATH": str(home / "comfyui")})
    files = found.stdout.split()[-4:]
    assert files[0].startswith(str(kit)) and all(file.startswith(str(home)) for file in files[1:]), files

    before = (home / "out" / "gpu-table.jsonl").read_bytes()
    again = subprocess.run(start[:3], env={**environment, "OUT": str(tmp_path / "second")}, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and (tmp_path / "second" / "gpu-table.jsonl").read_bytes() == before


def test_what_is_left_out(kit):
    with tarfile.open(kit / "comfyui.tar.xz") as archive:
        names = archive.getnames()
    assert "comfyui/comfy/ldm/cosmos/cosmos_tokenizer/layers3d.py" in names  # code, for all its name
    assert not [name for name in names if name.endswith((".safetensors", "merges.txt", "vocab.json"))]


def test_a_wheel_without_a_folder(tmp_path):
    """Its list of files is right, as pip checks it."""
    path = tmp_path / "x-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {"x/__init__.py": "a", "x/hip/big.so": "b" * 999, "x-1.0.dist-info/RECORD": "old"}.items():
            wheel.writestr(name, text)
    gpu_kit.without(path, "x/hip/")
    with zipfile.ZipFile(path) as wheel:
        rows = list(csv.reader(io.StringIO(wheel.read("x-1.0.dist-info/RECORD").decode())))
        assert sorted(wheel.namelist()) == sorted(row[0] for row in rows) == ["x-1.0.dist-info/RECORD", "x/__init__.py"]
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"a").digest()).rstrip(b"=").decode()
    assert ["x/__init__.py", f"sha256={digest}", "1"] in rows


def test_what_is_too_large_is_refused(kit, tmp_path, capsys, monkeypatch):
    assert gpu_kit.report(kit) == 0
    assert f"bash {os.path.relpath(kit, gpu_kit.PACK)}/start.sh" in capsys.readouterr().out
    with (tmp_path / "wheel.whl").open("wb") as file:
        file.truncate(gpu_kit.LIMIT)
    assert gpu_kit.report(tmp_path) == 1
    assert "too large: the machine takes no more" in capsys.readouterr().out


def test_a_folder_that_is_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("x", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu_kit.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists and is no kit"):
        gpu_kit.main()
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "x"

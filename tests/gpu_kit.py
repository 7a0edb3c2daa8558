"""Everything that half an hour on a bare GPU machine needs, in one folder: `python3 dev.py gpu-kit OUT`.

The machine has Python 3.12, torch for CUDA and Triton, and reaches no network; all that travels there, this checkout
among it, must be under 60 MiB. The folder gets ComfyUI's code without tokenizers and models, wheels of what that
machine lacks (comfy-kitchen without its half for AMD), a stand-in for PyAV, this pack, and start.sh: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ["COMFYUI_PATH"])
LIMIT = 60 * 2 ** 20  # bytes, with the checkout
# What ComfyUI and the pack import that the machine does not have. (A list of what it has is in docs/gpu.md.)
WHEELS = ("comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline")
OF_COMFYUI = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "utils", "app", "middleware", "api_server")
TOKENIZERS = ("_tokenizer/", "_tokenizer_", "sd1_tokenizer/")
OF_PACK = ("host", "quant", "loaders", "makers", "views", "engines", "routes", "nodes", "commands", "__init__.py", "__main__.py",
           "pyproject.toml", "tests/gpu", "tests/gpu_table.py", "tests/support")
START = """#!/usr/bin/env bash
# bash start.sh [STAGE ...]: unpack once, then measure; rows go to $OUT/gpu-table.jsonl (docs/gpu.md).
# The pack is the checkout around this folder, where there is one: what is changed there needs no new kit.
set -eu
kit="$(cd "$(dirname "$0")" && pwd)"
home="${QT_GPU_HOME:-/tmp/qt-gpu}"
out="${OUT:-$home/out}"
python="${PYTHON:-python3}"
pack="$(dirname "$kit")"
[ -f "$pack/tests/gpu_table.py" ] || pack="$home/pack"
if [ ! -f "$home/ready" ]; then
    mkdir -p "$home/site"
    for archive in comfyui pack; do tar -xJf "$kit/$archive.tar.xz" -C "$home"; done
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$home/site" "$kit"/*.whl
    touch "$home/ready"
fi
mkdir -p "$out"
if [ -f "$home/gpu-table.jsonl" ]; then cp "$home/gpu-table.jsonl" "$out/"; fi
export QT_REVISION="$(cat "$kit/REVISION")"
export PYTHONPATH="$home/site:$kit/stub" COMFYUI_PATH="$home/comfyui" PYTHONUNBUFFERED=1 PYTHONUTF8=1 HF_HUB_OFFLINE=1
code=0
"$python" "$pack/tests/gpu_table.py" --out "$out/gpu-table.jsonl" --skip-done --limit "${LIMIT:-560}" \\
    ${1:+--stage "$@"} ${TABLE_OPTIONS:-} || code=$?
cp "$out/gpu-table.jsonl" "$home/"
exit $code
"""
AV = '''"""Stands in for PyAV, which ComfyUI imports to read videos and nothing measured here uses: every name in it is an
empty class with names of the same kind, so that imports and annotations work. Reading a video does not."""

import importlib.abc
import importlib.machinery
import sys
import types


class _Anything(type):
    def __getattr__(cls, name):
        return _anything(name)


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Module(types.ModuleType):
    __path__: list = []

    def __getattr__(self, name):
        return _anything(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("av.") else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
__getattr__ = _anything
'''


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py gpu-kit", description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder in this checkout that git ignores, such as .gpu-kit")
    out = parser.parse_args().out.resolve()
    if out.exists():
        if not (out / "start.sh").is_file():
            sys.exit(f"{out} exists and is no kit. Give a new folder.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    fetch_wheels(out)
    for wheel in out.glob("comfy_kitchen-*.whl"):
        without(wheel, "comfy_kitchen/backends/hip/")
    fill(out)
    return report(out)


def fill(out: Path, preset: int = 9) -> None:
    """Everything but the wheels; `preset` is xz's."""
    archive(out / "comfyui.tar.xz", "comfyui", COMFYUI, comfyui_files(), preset)
    archive(out / "pack.tar.xz", "pack", PACK, tracked(*OF_PACK), preset)
    (out / "stub" / "av").mkdir(parents=True)
    (out / "stub" / "av" / "__init__.py").write_text(AV, encoding="utf-8")
    (out / "start.sh").write_text(START, encoding="utf-8")
    (out / "REVISION").write_text(revision() + "\n", encoding="utf-8")


def report(out: Path) -> int:
    """Print what the kit weighs; 1 where it is too much."""
    parts = {str(file.relative_to(out)): file.stat().st_size for file in sorted(out.rglob("*")) if file.is_file()}
    parts["this checkout, which travels as it is"] = sum((PACK / name).stat().st_size for name in tracked())
    for name, size in parts.items():
        print(f"{size / 2 ** 20:7.2f} MiB  {name}")
    total = sum(parts.values())
    print(f"{total / 2 ** 20:7.2f} MiB  together, of {LIMIT / 2 ** 20:.0f}")
    if total > LIMIT:
        print("too large: the machine takes no more. Leave something out of this checkout, or of tests/gpu_kit.py.")
        return 1
    print(f"on the GPU machine, in this checkout's folder: bash {os.path.relpath(out, PACK)}/start.sh 0 1 2 3")
    return 0


def fetch_wheels(out: Path) -> None:
    """The wheels for Python 3.12 on Linux, in the versions that are tested here."""
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
                    *(word for platform in platforms for word in ("--platform", platform)), "-d", str(out), *pinned],
                   check=True)


def without(wheel: Path, folder: str) -> None:
    """Take a folder out of a wheel, and out of its list of files."""
    lines, record = [], ""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            if name.startswith(folder) or name.endswith("/"):
                continue
            if name.endswith(".dist-info/RECORD"):
                record = name
                continue
            data = old.read(name)
            new.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}\n")
        new.writestr(record, "".join([*lines, f"{record},,\n"]))
    smaller.replace(wheel)


def comfyui_files() -> list[str]:
    """ComfyUI's code, and what beside it is read as it is imported: not the vocabularies of tokenizers."""
    found = [path.name for path in COMFYUI.glob("*.py")]
    for folder in OF_COMFYUI:
        found += [path.relative_to(COMFYUI).as_posix() for path in sorted((COMFYUI / folder).rglob("*"))
                  if path.suffix in (".py", ".json", ".yaml", ".txt") and "__pycache__" not in path.parts]
    return [name for name in found if name.endswith(".py") or not any(mark in name for mark in TOKENIZERS)]


def tracked(*names: str) -> list[str]:
    """The files that git knows or would add, of this checkout or of some of its folders."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *names], cwd=PACK,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (PACK / name).is_file()]


def revision() -> str:
    """The commit that the kit is made of."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PACK, capture_output=True, text=True,
                          check=True).stdout.strip()


def archive(path: Path, top: str, root: Path, names: Iterable[str], preset: int) -> None:
    """An archive of files of `root` below a folder `top`."""
    with tarfile.open(path, "w:xz", preset=preset) as tar:
        for name in names:
            tar.add(root / name, f"{top}/{name}", recursive=False)


if __name__ == "__main__":
    sys.exit(main())

"""Whether the real nunchaku engine is installed, found out without importing it, and which files its kernels take.

PyPI's package of the same name is a statistics library that installs and imports without complaint
(docs/sources/nunchaku.md, "The package on PyPI"), so neither the name, an import nor the version tells.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import NamedTuple

from ...host.texts import Text

RELEASES = "https://github.com/nunchaku-ai/nunchaku/releases"
TURING, AMPERE, BLACKWELL = {(7, 5)}, {(8, 0), (8, 6), (8, 9)}, {(12, 0), (12, 1)}


class Wheel(NamedTuple):
    """What is installed under the name nunchaku: `problem` is empty for the real engine, else says what to do."""

    version: str
    problem: str


def find() -> Wheel:
    """Look for nunchaku's compiled module and its linear layers, without importing anything of it."""
    try:
        version = importlib.metadata.version("nunchaku")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    try:
        spec = importlib.util.find_spec("nunchaku")
    except (ImportError, ValueError):  # a module of that name without a spec
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    real = any((folder / "models" / "linear.py").is_file() and any(_compiled(folder)) for folder in folders)
    if real:
        return Wheel(version, "")
    if spec is None:
        return Wheel("", Text("nunchaku is not installed. {install}", install=_install()))
    if any((folder / "models" / "linear.py").is_file() for folder in folders):
        return Wheel(version, Text("nunchaku {version} has no compiled module (_C) for this Python. Run `{python} -m "
                                   "pip uninstall nunchaku`, then: {install}", version=version, python=_python(),
                                   install=_install()))
    return Wheel(version, Text("The package named nunchaku in this Python ({version}) is a statistics library, not the "
                               "SVDQuant engine. Run `{python} -m pip uninstall nunchaku`, then: {install}",
                               version=version or Text("unknown version"), python=_python(), install=_install()))


def _compiled(folder: Path) -> list[Path]:
    return [path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern)]


def _python() -> str:
    return "python" if " " in sys.executable or not sys.executable else sys.executable


def _install() -> str:
    """The command, with the three versions that must match (docs/sources/nunchaku.md, "The package on PyPI")."""
    try:
        import torch

        built = Text("torch {torch} / CUDA {cuda}", torch=".".join(torch.__version__.split(".")[:2]),
                     cuda=torch.version.cuda or Text("none"))
    except ImportError:
        built = Text("your torch and CUDA")
    python = ".".join(platform.python_version_tuple()[:2])
    return Text("run `{python} -m pip install <wheel>` with the wheel for {built} / Python {version} from {releases} "
                "(not from PyPI)", python=_python(), built=built, version=python, releases=RELEASES)


def gate(kinds: set[str] | frozenset[str], capability: tuple[int, int] | None) -> str:
    """Why nunchaku's kernels do not run weights of these kinds on this GPU; empty when they do
    (docs/sources/nunchaku.md, "Hardware")."""
    if capability is None:
        return Text("nunchaku runs on NVIDIA GPUs only.")
    if capability in BLACKWELL:
        return Text('Please use "fp4" quantization for Blackwell GPUs.') if "int4" in kinds else ""
    if capability in TURING | AMPERE:
        return Text('Please use "int4" quantization for Turing, Ampere and Ada GPUs.') if "nvfp4" in kinds else ""
    sm = capability[0] * 10 + capability[1]
    return Text("Unsupported GPU architecture {sm} due to the lack of 4-bit tensorcores. Please use a Turing, Ampere, "
                "Ada or Blackwell GPU for this quantization configuration.", sm=sm)

"""What an installation of SGLang can do, asked of its own Python without importing it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError

COMMAND = "sglang"
SECONDS = 120.0  # torch takes its time on a cold disk
_QUESTION = Path(__file__).with_name("question.py")


class GPU(NamedTuple):
    """A card: its CUDA compute capability, and its memory in bytes."""

    name: str
    capability: tuple[int, int]
    bytes: int


class Installed(NamedTuple):
    """Versions are empty for what is not installed. `engine`: the package nunchaku is the SVDQuant engine."""

    command: str
    sglang: str
    torch: str
    flashinfer: str
    nunchaku: str
    engine: bool
    npu: bool
    gpus: tuple[GPU, ...]


def find(command: str = "") -> Installed | None:
    """The installation that a command (a path, or a name on PATH; "" is `sglang`) belongs to; None where there is none
    of the usual name. Raises CheckpointError where a given one is not there, or does not answer."""
    path = shutil.which(command or COMMAND)
    if path is None:
        if not command:
            return None
        raise CheckpointError(Text("there is no such command"), command, Text("give the path of the program sglang"))
    python = _python(Path(path))
    try:
        done = subprocess.run(
            [str(python), str(_QUESTION)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": ""},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(
            Text("its Python does not answer: {error}", error=error), str(python), Text("repair that installation")
        ) from error
    line = next((line for line in done.stdout.splitlines() if line.startswith("QT{")), "")
    if not line:
        raise CheckpointError(
            Text("its Python does not answer: {error}", error=done.stderr.strip()[-300:]),
            str(python),
            Text("repair that installation"),
        )
    found = json.loads(line[2:])
    gpus = tuple(GPU(name, tuple(capability), memory) for name, capability, memory in found.pop("gpus"))
    return Installed(command=path, gpus=gpus, **found)


def _python(program: Path) -> Path:
    """The Python of a program that pip has installed: the one in its first line, or the one beside it."""
    with open(program, "rb") as file:
        first = file.readline(400)
    if first.startswith(b"#!") and b"python" in first:
        named = first[2:].decode(errors="replace").strip()
        if os.path.isfile(named):
            return Path(named)
    beside = [program.parent / name for name in ("python", "python3", "python.exe")]
    return next((path for path in beside if path.is_file()), Path(sys.executable))

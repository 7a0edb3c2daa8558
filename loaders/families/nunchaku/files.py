"""Which file of a folder or repo is the SVDQuant checkpoint, by names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .... import host
from ....host.texts import Text
from ...errors import CheckpointError, MissingFiles
from ...words import first_ten

PRECISIONS = ("auto", "int4", "nvfp4")  # of the node
KNOWN = tuple(f"nunchaku-tech/nunchaku-{name}" for name in (
    "flux.1-dev", "flux.1-schnell", "flux.1-fill-dev", "flux.1-canny-dev", "flux.1-depth-dev", "flux.1-kontext-dev",
    "flux.1-krea-dev", "qwen-image", "qwen-image-edit", "qwen-image-edit-2509", "z-image-turbo", "sdxl",
    "sdxl-turbo"))
# Patterns are compiled when they are first used: ComfyUI imports this module at every start.
NAME = r"svdq-(int4|fp4)_r(\d+)"
STEPS = r"(?i)(\d+)-?steps?(?![a-z])"
PRECISION = {"int4": "int4", "fp4": "nvfp4"}  # of file names -> ours
METHODS = ("nunchaku_lite", "svdquant")  # quant_method in config.json, of other writers
LEGACY = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
RANK = 32  # what is published for every model


class Choice(NamedTuple):
    """What a file must hold: `precision` auto, int4 or nvfp4; `rank` of the low-rank branch, 0 for any."""

    precision: str = "auto"
    rank: int = 0


def named_file(path: str) -> bool:
    """Whether a file is called as an SVDQuant file, or as the first of a legacy folder's two."""
    return bool(re.search(NAME, path)) or path.rpartition("/")[2] == LEGACY[0]


def choose_file(inside: Sequence[str], where: str, precision: str = "auto", rank: int = 0
                ) -> tuple[tuple[str, ...], str] | None:
    """(the files to load, why) of these names in a folder, or None when none is called as an SVDQuant file is.

    `precision` (auto, int4, nvfp4) and `rank` (0: auto) choose among several. auto is nvfp4 on a Blackwell GPU (SM 10.0
    and newer) and int4 elsewhere, and rank 32, where there is such a file; then the one for any number of steps. Raises
    MissingFiles for half of a legacy folder and where none is left, CheckpointError when several are.
    """
    legacy = [name for name in LEGACY if name in inside]
    if LEGACY[0] in legacy:
        if len(legacy) < len(LEGACY):
            raise MissingFiles(Text("this legacy folder lacks {file}", file=LEGACY[1]), where,
                               Text("finish its download"))
        return LEGACY, Text("a legacy folder of two files, read as one")
    named = sorted(name for name in inside if re.search(NAME, name) and name.endswith(".safetensors"))
    if not named:
        return None
    left = named
    for key, wanted, auto in ((_precision, precision, "nvfp4" if _blackwell() else "int4"),
                              (_rank, rank or "auto", RANK), (_steps, "auto", None)):
        fits = [name for name in left if key(name) == (auto if wanted == "auto" else wanted)]
        left = fits if fits or wanted != "auto" else left
    if len(left) == 1:
        return (left[0],), Text("{name} taken of {count} svdq files", name=left[0],
                                count=len(named)) if len(named) > 1 else ""
    what = Text("svdq files") if left else Text("svdq file")
    if precision != "auto":
        what = Text("{files} of {precision}", files=what, precision=precision)
    if rank > 0:
        what = Text("{files} of rank {rank}", files=what, rank=rank)
    if not left:  # another place, or a download, may have it
        raise MissingFiles(Text("there is no {file} among {names}", file=what, names=first_ten(named)), where,
                           Text("change precision or rank, or download that file"))
    raise CheckpointError(Text("there are {count} {files}: {names}", count=len(left), files=what,
                               names=first_ten(left)), where,
                          Text("name the one to use in weights_name"))


def download_pattern(precision: str = "auto", rank: int = 0) -> str:
    """The glob of the files that `choose_file` would choose from in a repo, for the download command."""
    word = "fp4" if precision == "nvfp4" or precision == "auto" and _blackwell() else "int4"
    return f"svdq-{word}_r{rank or RANK}-*.safetensors"


def _precision(name: str) -> str:
    found = re.search(NAME, name)
    return PRECISION[found[1]] if found else ""


def _rank(name: str) -> int:
    found = re.search(NAME, name)
    return int(found[2]) if found else 0


def _steps(name: str) -> str | None:
    found = re.search(STEPS, name)
    return found[1] if found else None


def _blackwell() -> bool:
    try:
        capability = host.capability()
    except ImportError:  # headers are read without torch and ComfyUI, too
        return False
    return capability is not None and capability >= (10, 0)

"""docs/bench.md: the recorded runs of `python3 dev.py bench`, one heading and one table each, the newest last."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu.machine import revision

from support.bench import Result, number
from support.pack import COMFYUI, PACK

PAGE = PACK / "docs" / "bench.md"
COLUMNS = ("part", "measure", "ours", "before", "budget", "others")
# as torch asks for them -> as people call them
SETS = {"_is_avx2_supported": "AVX2", "_is_avx512_supported": "AVX-512", "_is_vnni_supported": "VNNI",
        "_is_avx512_bf16_supported": "bf16", "_is_amx_tile_supported": "AMX"}


class Recorded(NamedTuple):
    """A run as the page has it: its heading, the sentence about it, and (part, measure) -> its cells by column."""

    title: str
    about: str
    rows: dict[tuple[str, str], dict[str, str]]


def about(note: str) -> tuple[str, str]:
    """(heading, sentence) of a run on this machine, now, of what is checked out."""
    from importlib.metadata import version

    import torch

    sets = [name for ask, name in SETS.items() if getattr(torch.cpu, ask, bool)()]
    comfyui = re.search(r'__version__ = "([^"]+)"', (COMFYUI / "comfyui_version.py").read_text(encoding="utf-8"))
    load = f" Load average {os.getloadavg()[0]:.1f}." if hasattr(os, "getloadavg") else ""
    return (f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {revision(PACK)}",
            f"{_processor()}, {os.cpu_count()} processors ({', '.join(sets) or 'none of ' + ', '.join(SETS.values())}), "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, comfy-kitchen "
            f"{version('comfy-kitchen')}, ComfyUI {comfyui[1] if comfyui else 'unknown'}.{load}{' ' * bool(note)}{note}")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = dict(re.findall(r"^(vendor_id|model name|cpu family|model|stepping)\s*: (.*)$", file.read(), re.M))
        return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def parse(text: str) -> list[Recorded]:
    """The runs of a page, in its order."""
    runs = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        lines = section.strip().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
        rows = {(row[0], row[1]): dict(zip(COLUMNS, row, strict=True)) for row in cells}
        runs.append(Recorded(lines[0], lines[2], rows))
    return runs


def append(page: Path, found: Mapping[str, Sequence[Result]], run: tuple[str, str]) -> None:
    """Add a run to the page, each number beside that of the run before: all of it or, on any error, nothing.

    Raises ValueError when the page would not be read back as what was measured.
    """
    text = page.read_text(encoding="utf-8")
    earlier = parse(text)
    before = earlier[-1].rows if earlier else {}
    rows = {}
    for part, results in found.items():
        for result in results:
            row = result.row
            was = before.get((part, row.name), {}).get("ours", "")
            limit = "" if row.budget is None else f"{row.budget:g}{' **over**' * result.over}"
            others = ", ".join(f"{who} {number(value)}" for who, value in row.beside.items())
            cells = (part, row.name, number(row.value, row.unit), was, limit, others)
            rows[part, row.name] = dict(zip(COLUMNS, cells, strict=True))
    lines = ["## " + run[0], "", run[1], "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS),
             *(f"| {' | '.join(cells.values())} |" for cells in rows.values())]
    text = text.rstrip() + "\n\n" + "\n".join(lines) + "\n"
    try:
        same = bool(rows) and parse(text) == [*earlier, Recorded(*run, rows)]
    except (ValueError, IndexError):  # a row of other cells than the table has
        same = False
    if not same:
        raise ValueError(f"this run cannot be written as a table: {run}, {list(rows)}")
    beside = page.with_name(page.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, page)
    finally:
        beside.unlink(missing_ok=True)

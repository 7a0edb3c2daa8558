"""The rows of `gpu-table` as the tables of docs/performance.md and a column of the README's: `python3 dev.py gpu-report`.

Reads docs/gpu/*.jsonl, one file a card and day, and writes both documents anew. A format whose kernel stage 2 found
wrong has no times here, whatever was measured of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.rows import read

PACK = Path(__file__).resolve().parents[1]
ROWS, PERFORMANCE, README = PACK / "docs" / "gpu", PACK / "docs" / "performance.md", PACK / "README.md"
NOT_YET = """**Not run on a GPU yet**, nor on an NPU: the native columns follow from the kernels' own gates and from tests
with CPU kernels and stand-ins."""
LAST = "AMD, Apple, CPU"  # of the README's own columns
IN_README = {"[ModelOpt FP8": "fp8", "[ModelOpt NVFP4]": "nvfp4", "[SVDQuant INT4]": "svdq int4, comfy-kitchen",
             "ModelSlim [INT8]": "int8", "[MXFP8]": "mxfp8", "BF16, F16, F32": "bf16"}
HEAD = """# Performance

What every format takes on GPUs that we had: whole steps of FLUX.1, single layers, loading, LoRAs. Written by `python3
dev.py gpu-report` from the rows in `docs/gpu`, which `gpu-table` measured ([GPU](gpu.md) says how, and what the words
mean). Numbers of formats that were found wrong there are left out. For your own GPU and checkpoint: `python <pack> bench
REF` ([command line](command_line.md)). Ratios that hold on a CPU: [recorded](bench.md).
"""


class Run:
    """The rows of one file."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = [row for row in rows if "begin" not in row]
        self.versions: dict[str, Any] = next((row for row in self.rows if row["stage"] == 0 and "card" in row), {})
        if not self.versions.get("sm") or self.versions["tiny"]:
            raise ValueError("these rows are not of a GPU at full size: run gpu-table there without --cpu and --tiny, "
                             "stage 0 among the stages")
        self.wrong = {row["key"]: row.get("error") or _how_wrong(row) for row in self.rows
                      if row["stage"] == 2 and not row.get("ok", False)}

    @property
    def card(self) -> str:
        """The card's short name, such as H100."""
        name = self.versions.get("card", "unknown card")
        found = re.search(r"NVIDIA (?:GeForce )?(.+?)(?: \d+GB.*| PCIe.*| SXM.*| NVL.*)?$", name)
        return found[1] if found else name

    @property
    def date(self) -> str:
        return str(self.versions.get("date", ""))

    def of(self, *stages: int) -> list[dict[str, Any]]:
        """Rows that were measured, of kernels that are right."""
        return [row for row in self.rows if row["stage"] in stages and "error" not in row and not self._is_wrong(row)]

    def _is_wrong(self, row: dict[str, Any]) -> bool:
        codec = row.get("arm", "").split(" ")
        named = {row.get("arm"), " ".join([*codec[:1], "tiles", row["kernel"] or "dequantize"]) if row.get("kernel") is not None
                 and codec[0] != "bf16" else None}
        return bool(named & self.wrong.keys())

    def row(self, stage: int, key: str) -> dict[str, Any]:
        return next((row for row in self.of(stage) if row["key"] == key), {})


def main() -> int:
    runs = []
    for path in sorted(ROWS.glob("*.jsonl")):
        try:
            runs.append(Run(read(path)))
        except ValueError as error:
            sys.exit(f"{path}: {error}")
    runs.sort(key=lambda run: run.date, reverse=True)
    PERFORMANCE.write_text(performance(runs), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8"), runs), encoding="utf-8")
    print(f"{PERFORMANCE.relative_to(PACK)} and {README.name}: {', '.join(run.card for run in runs) or 'no run yet'}")
    return 0


def performance(runs: list[Run]) -> str:
    """docs/performance.md."""
    lines = [HEAD.rstrip()]
    for run in runs:
        lines += ["", *section(run)]
    if not runs:
        lines += ["", "**Not run on a GPU yet.** No GPU was at hand so far."]
    return "\n".join(lines) + "\n"


def readme(text: str, runs: list[Run]) -> str:
    """The README with a column for each card (its newest run), and the sentence below the table."""
    newest = {run.card: run for run in reversed(runs)}
    lines, own = [], 0  # the table's own columns; those behind them are from here
    for line in text.splitlines():
        if f"| {LAST} |" in line:
            own = line[:line.index(LAST)].count("|") + 1
        own = own if line.startswith("|") else 0
        cells = line.split("|")[:own]
        lines.append("|".join([*cells, *(_cell(cells, run) for run in newest.values()), ""]) if own else line)
    said = NOT_YET if not newest else f"""*Step*: one of FLUX.1 at 1024 x 1024, of BF16's, measured on {', '.join(newest)}. Not run on an NPU
yet: that column follows from the kernels' own gates and from tests with stand-ins."""
    return re.sub(r"(?<=<!-- gpu -->).*?(?=<!-- /gpu -->)", lambda _: said, "\n".join(lines) + "\n", flags=re.DOTALL)


def _cell(cells: list[str], run: Run) -> str:
    first = cells[1].strip()
    if first == "family":
        return f" {run.card} step "
    if set(first) <= {"-"}:
        return "---"
    name = next((name for label, name in IN_README.items() if first.startswith(label)), "")
    found, base = run.row(4, name), run.row(4, "bf16")
    return f" {_ratio(found['step'], base['step'])} " if found and base else " - "


def section(run: Run) -> list[str]:
    """A card's tables."""
    v = run.versions
    lines = [f"## {v.get('card', run.card)}, {run.date}", "",
             f"SM {v.get('sm')}, {_gigabytes(v.get('memory', 0))}, driver {v.get('driver')}, CUDA {v.get('cuda')}, Python "
             f"{v.get('python')}, torch {v.get('torch')}, Triton {v.get('triton')}, ComfyUI {v.get('comfyui')}, "
             f"comfy-kitchen {v.get('kitchen')}, this pack {v.get('pack')}, {v.get('vram')}."]
    return [*lines, *_ceilings(run), *_correctness(run), *_steps(run), *_layers(run), *_rest(run), *_kernels(run), *_missing(run)]


def _ceilings(run: Run) -> list[str]:
    rows = [(row["key"], f"{row['bytes_per_second'] / 1e12:.2f} TB/s" if "bytes_per_second" in row else
             f"{row['flops'] / 1e12:.0f} TFLOPS") for row in run.of(1)]
    return _table("Ceilings", ["", "this card"], rows)


def _correctness(run: Run) -> list[str]:
    rows = [row for row in run.rows if row["stage"] == 2]
    if not rows:
        return []
    right = sum(bool(row.get("ok")) for row in rows)
    return ["", f"{right} of {len(rows)} kernels and layouts give the numbers of their definition in F64."
            + (" Wrong, and therefore without times below:" if run.wrong else ""),
            *(f"- {key}: {why}" for key, why in run.wrong.items())]


def _how_wrong(row: dict[str, Any]) -> str:
    return (f"{row.get('exact', 0):.3g} from F64 (bound {row.get('bound', 0):.3g}), {row.get('eager', 0):.3g} from plain torch"
            + ("" if row.get("finite", True) else ", not finite") + ("" if row.get("untouched", True) else ", writes into its weight"))


def _steps(run: Run) -> list[str]:
    return _step_table(run, 4, "A step of FLUX.1, 1024 x 1024, batch 1") + _step_table(
        run, 5, "The same at 512 x 512, and a fifth of its blocks compiled") + _step_table(
        run, 14, "The same with decoded weights kept, without dynamic VRAM")


def _step_table(run: Run, stage: int, title: str) -> list[str]:
    rows = []
    for row in run.of(stage):
        head, _, _ = row["key"].rpartition("bf16") if row["key"].endswith("bf16") else row["key"].rpartition(", ")
        base = run.row(stage, "bf16" if stage in (4, 14) else f"{head.rstrip(', ')}, bf16")
        rows.append((row["key"], row["kernel"] or "dequantized", f"{row['step']:.4f} s",
                     _ratio(row["step"], base["step"]) if base else "-", f"{100 * row['launch'] / row['step']:.0f} %",
                     _gigabytes(row["held"]), _gigabytes(row["peak"])))
    return _table(title, ["format", "kernel", "step", "of BF16's", "host", "held", "peak"], rows)


def _layers(run: Run) -> list[str]:
    rows: dict[str, dict[str, list[float]]] = {}
    for row in run.of(3):
        for tokens, times in row["times"].items():
            rows.setdefault(row["arm"], {}).setdefault(tokens, []).append(times["seconds"] / times["bf16"])
    counts = list(dict.fromkeys(tokens for times in rows.values() for tokens in times))
    return _table("Single layers, of BF16's time (median over FLUX.1's shapes), by tokens", ["arm", *counts],
                  [(arm, *(f"{sorted(found)[len(found) // 2]:.2f}x" if (found := times.get(tokens)) else "-" for tokens in counts))
                   for arm, times in rows.items()])


def _rest(run: Run) -> list[str]:
    def seconds(*names: str) -> Callable[[dict[str, Any]], tuple[str, ...]]:
        return lambda row: (row["key"], *(f"{row[name]:.3f} s" if name in row else "-" for name in names))

    loads = [row for row in run.of(7) if "load" in row]
    offload = [(row["key"], row["vram"], f"{row['step']:.3f} s", _gigabytes(row["weights"]), _gigabytes(row["held"]))
               for row in run.of(11, 12, 13)]
    nodes = [(row["key"], f"{row['psnr']:.1f} dB", f"{row['bound']:.0f} dB") for row in run.of(10) if "psnr" in row]
    return [*_table("A LoRA of rank 32 on every block layer", ["format", "patching", "step with it"],
                    [seconds("patch", "step")(row) for row in run.of(6)]),
            *_table("An FP8 file of FLUX.1's size", ["", "load", "to the GPU", "step"],
                    [seconds("load", "to_device", "step")(row) for row in loads]),
            *_table("Steps with half the memory that the weights need", ["format", "memory", "step", "weights", "held"], offload),
            *_table("One block of other models", ["", "step"], [seconds("step")(row) for row in run.of(9)]),
            *_table("A trained miniature through the nodes, latents against F32", ["", "PSNR", "at least"], nodes)]


def _kernels(run: Run) -> list[str]:
    rows = [(row["key"], f"`{name[:70]}`", f"{100 * spent / row['seconds']:.0f} %", str(calls))
            for row in run.of(8) for name, spent, calls in row["top"][:5]]
    return _table("What a step spends its time in", ["format", "kernel", "of the step", "calls"], rows)


def _missing(run: Run) -> list[str]:
    rows = [f"- stage {row['stage']}, {row['key']}: {row['error']}" for row in run.rows if "error" in row and row["stage"] != 2]
    return ["", "Not measured:", *rows] if rows else []


def _table(title: str, head: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    return ["", f"### {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
            *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)]


def _ratio(own: float, base: float) -> str:
    return f"{own / base:.2f}x"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())

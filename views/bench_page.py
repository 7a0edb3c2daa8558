"""What `bench` found, as one page that a user can send to somebody else, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from ..loaders.words import size

if TYPE_CHECKING:
    from ..makers.bench.run import Run

TOP = 15  # kernels
NAME = 90  # characters of a kernel's name
HOST_BOUND = 0.9  # share of a step that the CPU takes to launch it
MACHINE = ("this pack", "ComfyUI", "python", "torch", "comfy-kitchen", "device", "capability", "dynamic VRAM", "CUDA",
           "HIP", "torch_npu", "kitchen", "nunchaku", "flashinfer")


def page(runs: Iterable[Run], facts: dict[str, Any], sampled: str, date: str) -> str:
    """The page: the machine, the checkpoint, its base where there is one, and the kernels of a step of the first.

    `facts` are those of views/doctor.py, `sampled` says how, `date` when.
    """
    first, *base = runs
    text, width = first.takes.text
    tokens = f"{first.tokens:,} tokens and " if first.tokens else ""
    lines = [f"# {first.reference}, {date}", ""]
    lines += [f"{key}: {_words(facts[key])}" for key in MACHINE if facts.get(key) not in (None, "", "not installed")]
    lines.append(f"sampled: {sampled}, latent {list(first.latent)}, {tokens}{text:,} of text x {width:,}, all random")
    if facts.get("device type") == "cpu":
        lines.append("note: this is a CPU; its times say little of any GPU")
    for run in (first, *base):
        lines += ["", f"## {'base: ' if run is not first else ''}{run.reference}", run.report, *_times(run)]
    for run in base:
        lines += ["", f"## against its base {run.reference}", *_against(first, run)]
    return "\n".join([*lines, "", *_kernels(first)])


def to_json(runs: Iterable[Run], facts: dict[str, Any], sampled: str, date: str) -> dict[str, Any]:
    """The same, and every kernel, as JSON-able values: seconds and bytes."""
    def values(run: Run) -> dict[str, Any]:
        return {**run._asdict(), "measured": run.measured._asdict(), "takes": run.takes._asdict()}

    first, *base = runs
    machine = {key: facts[key] for key in (*MACHINE, "device type") if key in facts}
    return {"date": date, "sampled": sampled, "machine": machine, "model": values(first),
            "base": values(base[0]) if base else None}


def _times(run: Run) -> list[str]:
    steps, there, total = run.measured.steps, *run.weights
    step, launch = median(steps), median(run.measured.launch)
    share = launch / step
    lines = [f"computes in: {run.dtype}",
             f"load: {run.load:.2f} s; first step {run.first:.2f} s, with the weights' way to the device in it",
             f"step: {step:.4f} s ({min(steps):.4f} to {max(steps):.4f}, {len(steps)} steps)"]
    if run.measured.held:
        bound = "the CPU is what limits it, not the GPU" if share >= HOST_BOUND else "the GPU limits it"
        lines.append(f"launch: {launch:.4f} s of a step until the CPU has handed it over, {100 * share:.0f} %: {bound}")
        peak = f", peak {size(run.measured.peak)}" if run.measured.peak else ""
        lines.append(f"memory of the device: {size(run.measured.held)} of {size(total)} of weights{peak}")
    else:
        lines.append(f"weights: {size(total)}")
    if there < total:
        lines.append("note: not all weights fit on the device; the rest comes over in every step")
    return lines


def _against(run: Run, base: Run) -> list[str]:
    def ratio(name: str, own: float, other: float) -> list[str]:
        return [f"{name}: {own / other:.2f}x"] if own and other else []

    return [*ratio("step", median(run.measured.steps), median(base.measured.steps)),
            *ratio("weights", run.weights[1], base.weights[1]),
            *ratio("peak memory", run.measured.peak, base.measured.peak), *ratio("load", run.load, base.load)]


def _kernels(run: Run) -> list[str]:
    total = sum(seconds for _, seconds, _ in run.kernels) or 1.0
    lines = [f"## kernels of a step of {run.reference}: {total:.4f} s in {len(run.kernels)}",
             "  seconds  share  calls  name"]
    for name, seconds, calls in run.kernels[:TOP]:
        name = name if len(name) <= NAME else name[:NAME - 1] + "…"
        lines.append(f"{seconds:9.5f} {100 * seconds / total:5.1f}% {calls:6}  {name}")
    return lines


def _words(value: Any) -> str:
    return "; ".join(f"{name}: {words}" for name, words in value.items()) if isinstance(value, dict) else str(value)

"""One checkpoint from its files to timed steps: what the command `bench` measures of each of its two."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from ... import host
from ...loaders.architectures.base import Inputs
from ...loaders.model import Request, load
from .measure import Measured, inputs_of, measure, profile, random_conditioning, random_latent, tokens_of

WARM = 2  # steps that are not counted: they choose kernels and fill caches


class Sampling(NamedTuple):
    """What is sampled: pixels, frames, and how many steps are timed."""

    width: int
    height: int
    frames: int = 1
    steps: int = 8


class Run(NamedTuple):
    """`report`: what the load said. `dtype`: what the model computes in. `load`: seconds of the load; `first`: of the
    first step, with the weights' way to the device in it. `weights`: bytes on the device and in all (all on a CPU).
    `kernels`: (name, seconds, calls) of a step, most first. `latent`: its shape; `tokens` it becomes (0 for a UNet),
    beside what `takes` says of the prompt."""

    reference: str
    report: str
    dtype: str
    load: float
    first: float
    measured: Measured
    weights: tuple[int, int]
    kernels: tuple[tuple[str, float, int], ...]
    latent: tuple[int, ...]
    tokens: int
    takes: Inputs


def run(request: Request, sampling: Sampling, trace: str = "") -> Run:
    """Load, sample, profile a step (its trace goes to the file `trace`), and take the MODEL off the device again.

    Call it under torch.inference_mode. Raises CheckpointError as a load does, and as measure.py says.
    """
    start = perf_counter()
    loaded = load(request)
    seconds = perf_counter() - start
    try:
        patcher = loaded.patcher
        latent = random_latent(patcher, sampling.width, sampling.height, sampling.frames)
        said, takes = random_conditioning(patcher), inputs_of(patcher)
        first, = measure(patcher, latent, said, warm=0, steps=1).steps
        found = measure(patcher, latent, said, warm=WARM, steps=sampling.steps)
        there, total = host.weight_bytes(patcher)
        kernels = profile(patcher, latent, said, path=trace)
        return Run(reference=request.reference, report=loaded.report, load=seconds, first=first, measured=found,
                   dtype=str(patcher.model.get_dtype_inference()).removeprefix("torch."),
                   weights=(total if host.is_cpu() else there, total), kernels=tuple(kernels),
                   latent=tuple(latent["samples"].shape), tokens=tokens_of(takes, latent), takes=takes)
    finally:
        host.let_go()

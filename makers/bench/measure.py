"""Sampling steps of a MODEL, timed as users run them: through ComfyUI's own sampler.

Inputs are random values of the right shapes; kernels do not care. Nothing here knows an architecture by its name: what
each takes is in its own file (loaders/architectures). Load and measure under torch.inference_mode, as the server runs
its nodes: weights that were loaded without it cannot be moved within it.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import host
from ...host.texts import Text
from ...loaders.architectures import ARCHITECTURES
from ...loaders.architectures.base import Inputs
from ...loaders.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SAMPLER = {"sampler_name": "euler", "scheduler": "simple", "cfg": 1.0}  # a forward a step, and no second prompt
PROFILED = 2  # the step that is profiled, from 0: those before choose kernels and fill caches


class Measured(NamedTuple):
    """`steps`: seconds of each timed sampling step, until the device was done. `launch`: of these, seconds until the
    host (Python, CPU) had handed over the step's work; where the host has to wait for the device within a step, that
    counts as the host's. `held`: bytes of the device's memory that are the model's after the run. `peak`: most bytes
    allocated on the device during the timed steps, less what was there before the load. Both are 0 on a CPU, `peak`
    also where torch does not count it (MPS)."""

    steps: tuple[float, ...]
    launch: tuple[float, ...]
    held: int
    peak: int


def measure(patcher: Any, latent: dict[str, Any], positive: list[Any], *, warm: int = 2, steps: int = 8,
            seed: int = 0) -> Measured:
    """Sample `warm` steps that are not counted, and `steps` that are, in one run of euler.

    With `warm` 0 the first step counts from the call: the weights' way to the device, and whatever is compiled or
    chosen at first use, are in it. Raises CheckpointError for a latent in several parts, and when memory runs out.
    """
    held, _ = host.weight_bytes(patcher)
    before = host.allocated_memory() - (0 if patcher.is_dynamic() else held)  # dynamic weights are not torch's
    ends: list[tuple[float, float]] = []  # of each step: when the host had handed it over, when the device was done

    def on_step(step: int, x0: torch.Tensor) -> None:
        handed = perf_counter()
        host.synchronize()
        ends.append((handed, perf_counter()))
        if step == warm - 1:
            host.forget_peak()

    host.forget_peak()
    host.synchronize()
    start = perf_counter()
    _sample(patcher, latent, positive, on_step, warm + steps, seed)
    peak = host.allocated_memory(peak=True)
    done = [start, *(end for _, end in ends)]
    times = [end - begin for begin, end in zip(done, done[1:], strict=False)]
    handed = [over - begin for begin, (over, _) in zip(done, ends, strict=False)]
    held = 0 if host.is_cpu() else host.weight_bytes(patcher)[0]
    if peak:
        peak = max(0, peak - before + (held if patcher.is_dynamic() else 0))
    return Measured(tuple(times[warm:]), tuple(handed[warm:]), held, peak)


def profile(patcher: Any, latent: dict[str, Any], positive: list[Any], *,
            path: str = "") -> list[tuple[str, float, int]]:
    """(kernel, device seconds, calls) of one step after warm-up, most first; a Chrome trace of it goes to `path`.

    On a CUDA or HIP device these are its kernels and copies. Elsewhere they are torch's operations and the CPU's own
    seconds in each. Raises CheckpointError as `measure` does, and where the trace cannot be written.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = not host.is_cpu() and host.device_type() == "cuda"
    found = profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True)

    def on_step(step: int, x0: torch.Tensor) -> None:
        host.synchronize()
        if step == PROFILED - 1:
            found.start()
        elif step == PROFILED:
            found.stop()

    _sample(patcher, latent, positive, on_step, PROFILED + 1, 0)
    if path:
        try:
            with open(path, "wb"):  # torch itself only prints that it cannot write
                pass
            found.export_chrome_trace(path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(Text("the trace cannot be written: {error}", error=error), path,
                                  Text("give the path of a .json file")) from error
    rows = []
    for event in found.key_averages():
        on_cpu = event.device_type.name == "CPU"
        if on_cpu == cuda or getattr(event, "is_user_annotation", False):
            continue  # of a device's step its kernels alone, not who asked for them
        micro = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        if micro > 0:
            rows.append((str(event.key), micro / 1e6, int(event.count)))
    return sorted(rows, key=lambda row: -row[1])


def random_latent(patcher: Any, width: int, height: int, frames: int = 1) -> dict[str, Any]:
    """A LATENT for so many pixels and frames, empty as from ComfyUI's nodes; sampling fills it with noise.

    Raises CheckpointError for several frames of a model that makes pictures.
    """
    try:
        return host.empty_latent(patcher, width, height, frames)
    except ValueError as error:
        raise CheckpointError(error, Text("{frames} frames", frames=frames),
                              Text("ask for one frame")) from error


def random_conditioning(patcher: Any, seed: int = 0) -> list[Any]:
    """CONDITIONING of random values, F32, in the shapes that ComfyUI's text encoders give this model.

    Pictures that a model may be given (image to video, edit, fill) are left out; ComfyUI then makes do with zeros.
    Raises CheckpointError for a model of an architecture that this pack does not know.
    """
    import torch

    takes = inputs_of(patcher)
    numbers = torch.Generator().manual_seed(seed)
    pooled = {"pooled_output": torch.randn(1, takes.pooled, generator=numbers)} if takes.pooled else {}
    return [[torch.randn(1, *takes.text, generator=numbers), pooled]]


def inputs_of(patcher: Any) -> Inputs:
    """What a MODEL takes beside the latents. Raises CheckpointError for an architecture unknown here."""
    unet_config = patcher.model.model_config.unet_config
    for architecture in ARCHITECTURES:
        dims = architecture.dims_from_model(unet_config)
        if dims is not None:
            return architecture.inputs(dims)
    raise CheckpointError(Text("the MODEL is {kind}, and what it takes is not known here",
                               kind=type(patcher.model).__name__), "",
                          Text("supported: {architectures}", architectures=", ".join(a.name for a in ARCHITECTURES)))


def tokens_of(takes: Inputs, latent: dict[str, Any]) -> int:
    """How many tokens a latent becomes; 0 for a UNet."""
    if not takes.patch:
        return 0
    frames, (height, width) = latent["samples"].shape[2:-2], latent["samples"].shape[-2:]
    return math.prod(frames) * math.ceil(height / takes.patch) * math.ceil(width / takes.patch)


def _sample(patcher: Any, latent: dict[str, Any], positive: list[Any], on_step: Any, steps: int, seed: int) -> None:
    """Sample without previews."""
    try:
        host.sample(patcher, host.start_of(patcher, latent, seed), on_step, steps=steps, quiet=True,
                    positive=positive, negative=positive, seed=seed, **SAMPLER)
    except TypeError as error:
        raise CheckpointError(Text("this is {error}", error=error), "",
                              Text("measure with a latent of pictures or video alone")) from error
    except Exception as error:
        if not host.is_out_of_memory(error):
            raise
        raise CheckpointError(Text("the device's memory ran out"),
                              Text("latent {shape}", shape=list(latent["samples"].shape)),
                              Text("take a smaller size or fewer frames, and close what else uses the device")
                              ) from error

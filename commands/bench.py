"""`bench REF`: what a checkpoint takes on this machine, and which kernels, against its base; one page to send on."""

from __future__ import annotations

import argparse
import json
import os
import re

from . import options as shared

HELP = "step time, memory and kernels of a checkpoint on this machine, against its base"
NEEDS_HOST = "yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_reference(parser)
    parser.add_argument("--base", default="", metavar="REF", help="the same model unquantized, to measure beside it")
    parser.add_argument("--size", type=_pixels, default=(1024, 1024), metavar="WxH", help="pixels (1024x1024)")
    parser.add_argument("--frames", type=_positive, default=1, help="of a video (1)")
    parser.add_argument("--steps", type=_positive, default=8, help="timed steps, after two that are not (8)")
    parser.add_argument("--dtype", default="default", choices=["default", "bf16", "fp16", "fp32"],
                        help="as in the nodes")
    parser.add_argument("--compute", default="auto", choices=["auto", "native", "dequantize"], help="as in the nodes")
    parser.add_argument("--backend", default="", help="a kernel by its name, as in the nodes' backend")
    parser.add_argument("--trace", default="", metavar="FILE.json", help="write a step's trace, for chrome://tracing "
                        "and ui.perfetto.dev")
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    import time

    import torch

    from .. import host
    from ..host.texts import said
    from ..loaders.errors import CheckpointError
    from ..loaders.model import Request
    from ..makers.bench.measure import SAMPLER
    from ..makers.bench.run import Sampling
    from ..makers.bench.run import run as measured
    from ..views.bench_page import page, to_json
    from ..views.doctor import facts

    if options.trace and not os.path.isdir(os.path.dirname(os.path.abspath(options.trace))):  # before minutes of work
        raise CheckpointError("the folder for the trace does not exist", options.trace, "make it, or give another path")
    dynamic = host.start_dynamic_vram()  # as a server has it
    host.ready()
    width, height = options.size
    sampling = Sampling(width, height, options.frames, options.steps)
    common = {"component": options.component, "download": options.download, "dtype": options.dtype}
    with torch.inference_mode():  # as the server runs its nodes
        runs = [measured(Request(options.reference, weights_name=options.weights_name, revision=options.revision,
                                 compute=options.compute, backend=options.backend, **common), sampling, options.trace)]
        if options.base:
            runs.append(measured(Request(options.base, **common), sampling))
    frames = f" x {options.frames} frames" if options.frames > 1 else ""
    sampled = f"{', '.join(f'{value}' for value in SAMPLER.values())} (cfg), {width} x {height}{frames}"
    found = (runs, {**facts(), "dynamic VRAM": "on" if dynamic else "off"}, sampled, time.strftime("%Y-%m-%d %H:%M %Z"))
    print(json.dumps(to_json(*found), indent=1) if options.json else said(page(*found)))
    return 0


def _pixels(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1024x1024")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return int(text)

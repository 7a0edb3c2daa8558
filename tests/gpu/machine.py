"""Where the stages run, and how large: the GPU at real shapes, or a CPU with tiny ones to see that everything works."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch


class Size(NamedTuple):
    """How large a run is: widths of FLUX.1, tokens of each timed matmul, repeats, and what the models are cut to."""

    hidden: int
    tokens: tuple[int, ...]
    repeats: int
    rank: int
    double: int
    single: int
    pixels: int
    steps: int


REAL = Size(3072, (1, 64, 512, 4096, 4608), 20, 32, 19, 38, 1024, 8)
TINY = Size(256, (1, 7), 2, 16, 1, 1, 64, 1)


class Where(NamedTuple):
    """The device, the size of the run, and how ComfyUI keeps memory: its own switches, and whether comfy-aimdo runs."""

    device: torch.device
    size: Size
    memory: str

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        return self.size is TINY

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()


def start(cpu: bool, tiny: bool, *options: str) -> Where:
    """Start ComfyUI on the GPU, or on the CPU, with options of its own, and the pack beside it."""
    from support.pack import start_comfy

    start_comfy(*options, cpu=cpu)
    from quantized_transformers import host

    dynamic = not cpu and host.start_dynamic_vram()  # as its server does
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return Where(torch.device("cpu" if cpu else "cuda"), TINY if tiny else REAL,
                 " ".join(["dynamic VRAM" if dynamic else "estimates", *options]))


def timed(calls: dict[str, Callable[[], Any]], where: Where) -> dict[str, tuple[float, float]]:
    """Name -> (median device seconds, median seconds until the host had launched it) of calls that take turns: there
    and back, so that clocks that drift hit all alike; caches are flushed before each."""
    device: dict[str, list[Any]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(2 ** 28 if where.cuda else 0, dtype=torch.uint8, device=where.device)  # larger than any L2
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(3 if where.cuda else 1):
                call()
        for i in range(where.size.repeats):
            for name in (calls if i % 2 else reversed(calls)):
                flush.zero_()
                where.wait()
                if where.cuda:
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    events[0].record()
                begin = perf_counter()
                calls[name]()
                host[name].append(perf_counter() - begin)
                if where.cuda:
                    events[1].record()
                    device[name].append(events)
    where.wait()
    seconds = {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] if where.cuda else host[name]
               for name, pairs in device.items()}
    return {name: (median(seconds[name]), median(host[name])) for name in calls}


def let_go() -> None:
    """Everything off the device."""
    from quantized_transformers import host

    gc.collect()
    host.let_go()


def versions(where: Where) -> dict[str, Any]:
    """What ran: card, driver, torch, ComfyUI, comfy-kitchen, the pack."""
    from importlib.metadata import PackageNotFoundError, version

    from quantized_transformers import host
    from support.pack import PACK

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    found = {"date": time.strftime("%Y-%m-%d"), "card": host.device_name(), "python": sys.version.split()[0], "torch": torch.__version__,
             "comfyui": host.version(), "kitchen": of("comfy-kitchen"), "triton": of("triton"),
             "pack": revision(PACK), "cores": os.cpu_count()}
    if where.cuda:
        properties = torch.cuda.get_device_properties(where.device)
        found |= {"card": properties.name, "memory": properties.total_memory, "sm": f"{properties.major}.{properties.minor}",
                  "processors": properties.multi_processor_count, "cuda": torch.version.cuda, "driver": _driver()}
    found |= {"vram": where.memory, "tiny": where.tiny}
    found["kitchen_backends"] = host.kitchen_backends()
    found["matmuls"] = sorted(host.machine().matmuls)
    return found


def revision(pack: Path) -> str:
    """The pack's commit, where the kit or git says it."""
    import subprocess

    if "QT_REVISION" in os.environ:  # from the kit, where no git is
        return os.environ["QT_REVISION"]
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=pack, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _driver() -> str:
    import subprocess

    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

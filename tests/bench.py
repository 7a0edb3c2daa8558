"""Timings, ratios and budgets: `python3 dev.py bench`. Exits with 1 when a budget is broken.

Everything that is compared runs interleaved, in fresh processes, medians of n >= 5; absolute times move with the
machine's load, ratios hardly do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import bench_build, bench_formats, bench_linear, bench_lists, bench_patches
from support.pack import COMFYUI, PACK

LOAD = r"""
import json, os, resource, sys, threading, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.sd, comfy.utils
from quantized_transformers.loaders import assemble, model
import quantized_transformers.quant.kernels.choose, quantized_transformers.quant.linear
how, path = sys.argv[1:3]

def anon():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

peak, running = anon(), True
def watch():
    global peak
    while running:
        peak = max(peak, anon())
        time.sleep(0.002)

relaid = 0
if how == "ours":  # what could not stay a view of the file; counted outside of the timed load
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import read
    from quantized_transformers.loaders.locate import locate
    checkpoint = Checkpoint(locate(path))
    family, plan = read(checkpoint)
    tensors = family.tensors(checkpoint, plan)
    mapped = {t.data_ptr() for t in tensors.mapped.values()}
    native = assemble.assemble(plan, tensors)
    relaid = sum(t.nbytes for t in native.tensors.values() if t.data_ptr() not in mapped)
    del native, tensors, plan, checkpoint
before, faults = anon(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
peak = before
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
patcher = model.rebuild(model.Request(path)) if how == "ours" else comfy.sd.load_diffusion_model(path)
seconds = time.perf_counter() - start
running = False
thread.join()
print(json.dumps({"seconds": seconds, "anon": max(peak, anon()) - before, "relaid": relaid,
                  "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults}))
"""

SVDQ_FILE = r"""
import os, sys
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import diffusers, torch
from support import svdquant_tables as tables
with torch.device("meta"):
    net = diffusers.FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True)
tables.header_only(sys.argv[1], {k: tuple(v.shape) for k, v in net.state_dict().items()}, tables.flux_table(19, 38, 3072),
                   sys.argv[2], 32, tables.flux_plain, True)
"""

SVDQ = r"""
import json, os, resource, sys, threading, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.ldm.flux.model, comfy.sd, comfy.utils, numpy, torch
from quantized_transformers.loaders import model
from quantized_transformers.loaders import prepare as preparing
from quantized_transformers.loaders.families.nunchaku import convert as converting
import quantized_transformers.quant.kernels.choose, quantized_transformers.quant.linear
path = sys.argv[1]
size = os.path.getsize(path)
torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))

def touch():
    with open(path, "rb", buffering=0) as f:  # into the page cache
        block = bytearray(1 << 24)
        while f.readinto(block):
            pass
    start = time.perf_counter()
    blocks = [numpy.ones(1 << 24, numpy.uint8) for _ in range(size >> 24)]  # memory that a virtual machine's host has found
    return time.perf_counter() - start

fresh = touch()

def copied():
    source, start = torch.ones(1 << 28, dtype=torch.uint8), time.process_time()
    copies = [source.clone() for _ in range(2)]
    return (time.process_time() - start) * size / sum(copy.nbytes for copy in copies)

copied = copied()
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # VmHWM starts again
before, anon, peak, running, spent = status("VmRSS"), status("RssAnon"), 0, True, {"read": 0, "assemble": 0, "cpu": 0, "user": 0}
def watch():
    global peak
    while running:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.01)
def timed(owner, name):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        start, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_THREAD)
        out = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        if name == "assemble":
            end = resource.getrusage(resource.RUSAGE_THREAD)
            spent["user"] = end.ru_utime - usage.ru_utime
            spent["cpu"] = spent["user"] + end.ru_stime - usage.ru_stime
        return out
    setattr(owner, name, wrapped)
timed(preparing, "assemble")
timed(converting._Reader, "read")
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
patcher = model.rebuild(model.Request(path))
seconds = time.perf_counter() - start
running = False
thread.join()
print(json.dumps({"seconds": seconds, "size": size, "before": before, "resident": status("VmHWM") - before,
                  "anon": max(peak, status("RssAnon")) - anon, "fresh": fresh, "copied": copied, **spent}))
"""

failures: list[str] = []


def budget(name: str, value: float, limit: float, unit: str) -> None:
    ok = value <= limit
    print(f"  {'ok  ' if ok else 'OVER'}  {name}: {value:.2f} {unit} (budget {limit:g})", flush=True)
    if not ok:
        failures.append(name)


def describing(folder: Path) -> None:
    import tracemalloc

    from support.pack import import_pack
    sys.path.insert(0, str(COMFYUI))
    import_pack()
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate
    from support.synthetic import flux_header

    print("describing from headers")
    for double, single, tensors, limit in ((7, 13, 780, 10), (46, 86, 5000, 40)):
        path = folder / f"{tensors}.safetensors"
        found = flux_header(path, double, single)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            describe(Checkpoint(locate(str(path))))
            times.append((time.perf_counter() - start) * 1e3)
        tracemalloc.start()
        describe(Checkpoint(locate(str(path))))
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        budget(f"{found} tensors, median of 15", median(times), limit, "ms")
        budget(f"{found} tensors, peak memory", peak, 5, "MB")
        path.unlink()


def importing() -> None:
    from host.test_import import measure

    print("importing the pack into ComfyUI")
    found = [measure.__wrapped__() for _ in range(5)]
    budget("import, median of 5", median(f["ms"] for f in found), 30, "ms")
    budget("modules of other packages", max(len(f["new"]) for f in found), 20, "")


ASK = r"""
import os, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.sample, comfy.samplers, comfy.sd, latent_preview
from quantized_transformers import host
start = time.perf_counter()
assert host.all_lacks() == {}
print((time.perf_counter() - start) * 1e3)
"""


def asking() -> None:
    print("asking ComfyUI for all that this pack leans on (host/contract.py), each part once")
    budget("all parts, median of 5", median(float(run(ASK).splitlines()[-1]) for _ in range(5)), 20, "ms")


def loading(folder: Path, rounds: int = 7) -> None:
    from support.synthetic import fp8_flux_twins

    print("loading FP8: a diffusers folder by the pack, against the same weights as one native file by stock ComfyUI")
    # A fifth of FLUX.1's depth: what does not grow with it (headers, the one swapped modulation) weighs as little here
    # as it does in the real model, within the memory of a small machine.
    ours, stock = fp8_flux_twins(folder, double=4, single=8)
    size = sum(f.stat().st_size for f in ours.glob("*.safetensors"))
    results: dict[str, list[dict]] = {"ours": [], "stock": []}
    for i in range(rounds + 1):  # the first round warms the page cache
        for how, path in (("ours", ours), ("stock", stock)) if i % 2 else (("stock", stock), ("ours", ours)):
            done = subprocess.run([sys.executable, "-c", LOAD, how, str(path)], capture_output=True, text=True,
                                  env={**os.environ, "PACK": str(PACK)}, check=True)
            if i:
                results[how].append(json.loads(done.stdout.splitlines()[-1]))
    med = {how: {key: median(r[key] for r in rows) for key in rows[0]} for how, rows in results.items()}
    for how in ("ours", "stock"):
        m = med[how]
        spread = sorted(r["seconds"] for r in results[how])
        print(f"  {how:5}  {m['seconds']:.3f} s ({spread[0]:.3f} .. {spread[-1]:.3f}), peak anonymous {m['anon'] / 1e6:.0f} MB, "
              f"{m['faults']:.0f} faults, {size / 1e9:.2f} GB")
    budget(f"wall, ratio of medians of {rounds}", med["ours"]["seconds"] / med["stock"]["seconds"], 1.1, "x")
    extra, relaid = med["ours"]["anon"] - med["stock"]["anon"], med["ours"]["relaid"]
    budget(f"extra anonymous memory (re-laid-out tensors: {relaid / 1e6:.1f} MB)", extra / 1e6,
           1.05 * relaid / 1e6, "MB")


# glibc keeps what is freed, so that the repack gets memory that the process has had before
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def loading_svdquant(folder: Path, precision: str, rounds: int = 3) -> None:
    path = folder / f"svdq-{precision}_r32-flux.1-dev.safetensors"
    run(SVDQ_FILE, str(path), precision)
    runs, recycled = [], []
    for _ in range(rounds):
        runs.append(json.loads(run(SVDQ, str(path)).splitlines()[-1]))
        recycled.append(json.loads(run(SVDQ, str(path), **KEEPING).splitlines()[-1]))
    path.unlink()
    most = {key: max(r[key] for r in runs) for key in runs[0]}
    least, kept = ({key: min(r[key] for r in each) for key in runs[0]} for each in (runs, recycled))
    per_gb = 1e9 / most["size"]
    print(f"loading a Nunchaku {precision} file of FLUX.1's size (sparse, in the page cache) on the CPU: "
          f"{most['size'] / 1e9:.2f} GB, one thread, worst memory and best times of {rounds} processes each, "
          f"load average {os.getloadavg()[0]:.1f}\n"
          f"  {least['seconds']:.1f} s; repack with its reads into fresh memory {least['assemble'] * per_gb:.2f} s a GB "
          f"(processor {least['cpu'] * per_gb:.2f}, without the kernel's share {least['user'] * per_gb:.2f}); "
          f"nothing but writing as many fresh bytes {least['fresh'] * per_gb:.2f}\n"
          f"  peak {(most['resident'] + most['before']) / 1e6:.0f} MB resident (VmHWM), before the load "
          f"{most['before'] / 1e6:.0f} MB: torch, ComfyUI and the pack imported, nothing loaded")
    budget("resident peak (VmHWM less the RSS before) beyond the file's size", (most["resident"] - most["size"]) / 1e6,
           300, "MB")
    budget("anonymous memory beyond the file's size", (most["anon"] - most["size"]) / 1e6, 300, "MB")
    # Fresh memory is at the mercy of a virtual machine's host, which may take longer to find it than the budget allows.
    budget("repack alone, wall, between buffers in memory that the process has",
           min(r["assemble"] - r["read"] for r in recycled) * per_gb, 2, "s a GB")
    budget("repack with its reads, wall, into memory that the process has", kept["assemble"] * per_gb, 2, "s a GB")
    budget("repack with its reads, processor time of the pack", least["user"] * per_gb, 0.8, "s a GB")
    budget("repack with its reads, processor time over copying as many bytes into a fresh tensor",
           min(r["cpu"] / r["copied"] for r in runs), 2.5, "x")


def run(script: str, *args: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True,
                          env={**os.environ, "PACK": str(PACK), **environment}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="qt-bench-") as temp:
        describing(Path(temp))
        importing()
        asking()
        bench_lists.listing(Path(temp), budget)
        if sys.platform == "linux":  # reads /proc
            loading(Path(temp))
            for precision in ("int4", "nvfp4"):
                loading_svdquant(Path(temp), precision)
            bench_formats.describing(Path(temp), budget)
            bench_formats.loading(Path(temp), budget)
            bench_linear.linears(budget)
            bench_patches.patching(Path(temp), budget)
            bench_build.writing(Path(temp), budget)
            bench_build.building(Path(temp), budget)
    print("all within budget" if not failures else f"over budget: {', '.join(failures)}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

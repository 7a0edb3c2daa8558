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

from support.pack import COMFYUI, PACK

LOAD = r"""
import json, os, resource, sys, threading, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.sd, comfy.utils
from quantized_transformers.loaders import assemble, model
import quantized_transformers.quant.ops
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
    from quantized_transformers.loaders.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.sources import locate
    checkpoint = Checkpoint(locate(path))
    d = describe(checkpoint)
    stored = checkpoint.load_tensors()
    mapped = {t.data_ptr() for t in stored.values()}
    native = assemble.assemble(model._architecture(d.architecture), d.dims, d.naming, stored, "")
    relaid = sum(t.nbytes for t in native.tensors.values() if t.data_ptr() not in mapped)
    del native, stored, checkpoint
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

SVDQ = r"""
import json, os, resource, sys, threading, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import diffusers, torch
from support import svdquant_models as made
from quantized_transformers.loaders import model
path = sys.argv[1]
torch.set_num_threads(1)
with torch.device("meta"):
    net = diffusers.FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True)
made.header_only(path, {k: tuple(v.shape) for k, v in net.state_dict().items()}, made.flux_table(19, 38, 3072), "int4",
                 32, made.flux_plain, True)

def anon():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

import quantized_transformers.quant.svdquant.ops
before, peak, running, user = anon(), 0, True, []
def watch():
    global peak
    while running:
        peak = max(peak, anon())
        time.sleep(0.01)
convert = model.convert
def timed(*args, **kwargs):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    out = convert(*args, **kwargs)
    user.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - start)
    return out
model.convert = timed
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
patcher = model.rebuild(model.Request(path))
seconds = time.perf_counter() - start
running = False
thread.join()
print(json.dumps({"seconds": seconds, "anon": max(peak, anon()) - before, "user": user[0], "size": os.path.getsize(path)}))
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
    from quantized_transformers.loaders.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.sources import locate
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
    found = [measure() for _ in range(5)]
    budget("import, median of 5", median(f["ms"] for f in found), 30, "ms")
    budget("modules of other packages", max(len(f["new"]) for f in found), 20, "")


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


def loading_svdquant(folder: Path) -> None:
    print("loading a Nunchaku file of FLUX.1's size (sparse), one thread")
    done = subprocess.run([sys.executable, "-c", SVDQ, str(folder / "svdq-int4_r32-flux.1-dev.safetensors")],
                          capture_output=True, text=True, env={**os.environ, "PACK": str(PACK)}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {found['seconds']:.1f} s, {found['size'] / 1e9:.2f} GB, peak anonymous {found['anon'] / 1e9:.2f} GB")
    budget("anonymous memory beyond the file's size", (found["anon"] - found["size"]) / 1e6, 300, "MB")
    # without the kernel's share, which is that of the pages it has to find: a fresh virtual machine needs most for that
    budget("repacking, processor time of the pack", found["user"] / found["size"] * 1e9, 2, "s a GB")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="qt-bench-") as temp:
        describing(Path(temp))
        importing()
        if sys.platform == "linux":  # reads /proc
            loading(Path(temp))
            loading_svdquant(Path(temp))
    print("all within budget" if not failures else f"over budget: {', '.join(failures)}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

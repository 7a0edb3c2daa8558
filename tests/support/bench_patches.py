"""What a LoRA on quantized weights costs, beside stock ComfyUI: to apply, each step, and in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from support.pack import PACK
from support.synthetic import fp8_flux_twins

RANK = 32
# Load the model, then with a LoRA of rank 32 on every Linear of the blocks; three layers with it and without, each in
# one shape of FLUX.1's, at as many tokens as a picture of 512 x 512 has.
SCRIPT = r"""
import json, os, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.model_management, comfy.sd, torch
from quantized_transformers.loaders import model
how, path, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
patcher = (model.load(model.Request(path), quiet=True).patcher if how == "ours" else
           comfy.sd.load_diffusion_model(path))
g, lora = torch.Generator().manual_seed(0), {}
for name, module in patcher.model.diffusion_model.named_modules():
    if "blocks." in name and getattr(module.weight if hasattr(module, "in_features") else None, "_layout_cls", ""):
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(module.out_features, rank, generator=g) / 100
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, module.in_features, generator=g) / 100
lora = {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}
load = lambda p: comfy.model_management.load_models_gpu([p], force_full_load=True)
load(patcher)
patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
start = time.perf_counter()
load(patched)
out = {"apply": time.perf_counter() - start, "layers": len(lora) // 2}
if how == "ours":
    net = patcher.model.diffusion_model
    modules = [net.double_blocks[0].img_attn.qkv, net.double_blocks[0].img_mlp[0], net.single_blocks[0].linear1]
    held = sum(one.elements for m in net.modules() if getattr(m, "held", None) for one in m.held.factors)
    size = {m.weight.dtype.itemsize for m in modules}.pop()
    out |= {"held": held * size, "lora": sum(t.numel() for t in lora.values()) * size}
    out["step"] = {}
    inputs = [torch.randn(1024, m.in_features, generator=g).to(m.weight.dtype) for m in modules]
    def once():
        start = time.perf_counter()
        with torch.inference_mode():
            for m, x in zip(modules, inputs):
                m(x)
        return time.perf_counter() - start
    taken = [m.held for m in modules]
    def switch(on):
        for m, held in zip(modules, taken):
            m.held = held if on else None
    rows = {True: [], False: []}
    for i in range(6):
        for on in (True, False) if i % 2 else (False, True):
            switch(on)
            spent = once()
            if i:
                rows[on].append(spent)
    out["step"] = {"with": sorted(rows[True])[2], "without": sorted(rows[False])[2]}
print(json.dumps(out))
"""


def patching(folder: Path, budget: Callable[[str, float, float, str], None], rounds: int = 3) -> None:
    """Applying a LoRA to a FLUX.1-shaped FP8 model, in fresh processes, ours and stock in turn."""
    print(f"a LoRA of rank {RANK} on FP8 layers of FLUX.1's shapes, fully loaded")
    root = folder / "patches"
    root.mkdir()
    ours, stock = fp8_flux_twins(root, double=1, single=1)
    results: dict[str, list[dict]] = {"ours": [], "stock": []}
    for i in range(rounds):
        for how, path in (("ours", ours), ("stock", stock)) if i % 2 else (("stock", stock), ("ours", ours)):
            done = subprocess.run([sys.executable, "-c", SCRIPT, how, str(path), str(RANK)], capture_output=True,
                                  text=True, env={**os.environ, "PACK": str(PACK)}, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            results[how].append(json.loads(done.stdout.splitlines()[-1]))
    times = {how: median(row["apply"] for row in rows) for how, rows in results.items()}
    row = results["ours"][-1]
    print(f"  {row['layers']} layers: ours {times['ours']:.3f} s, stock {times['stock']:.3f} s "
          f"({times['stock'] / times['ours']:.0f}x)")
    budget("applying, ratio of medians to a fiftieth of stock's", 50 * times["ours"] / times["stock"], 1, "x")
    budget("a step of three layers with it, ratio of medians",
           median(r["step"]["with"] / r["step"]["without"] for r in results["ours"]), 1.10, "x")
    budget("memory beside the weights, in LoRAs", row["held"] / row["lora"], 1, "x")

"""What a LoRA on quantized weights costs, beside stock ComfyUI and beside its own arithmetic: to apply, each step, and
in memory."""

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

# Two Linears of 3072 x 3072 in each format (codec, ComfyUI's layout or tiles one below the other, its word), processor
# time of one thread: loading them with a LoRA over up @ down alone, and a forward of 64 tokens with it over one without
# it and the two thin products. Then all Linears of FLUX.1, which have the bytes of one, over a copy of their codes.
FORMATS = {"FP8": ("fp8", "TensorCoreFP8E4M3Layout", "float8_e4m3fn"), "FP8 shards": ("fp8", 4, ""),
           "NVFP4": ("nvfp4", "TensorCoreNVFP4Layout", "nvfp4"), "MXFP8": ("", "TensorCoreMXFP8Layout", "mxfp8"),
           "INT8": ("", "TensorWiseINT8Layout", "int8_tensorwise"), "INT8 W8A16": ("w8a16", 1, ""),
           "INT8 W8A8": ("w8a8_dynamic", 1, ""), "SVDQ INT4": ("svdq_int4", 1, ""), "GPTQ INT4": ("u4_groups", 1, ""),
           "GGUF Q4_K": ("ggml_q4_k", 1, "")}
FLUX = 19 * [(18432, 3072)] * 2 + 19 * 2 * [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)] + \
    38 * [(21504, 3072), (3072, 15360), (9216, 3072)]
LAYERS = r"""
import json, os, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.lora, comfy.model_patcher, comfy.ops, torch
from comfy_kitchen.tensor import QuantizedTensor
from statistics import median
from quantized_transformers.quant.layouts.join import join
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from quantized_transformers.quant.patches import loading
from support.tiles import usual
torch.set_num_threads(1)
SIZE, TOKENS, TIMES, RANK, COUNT = 3072, 64, 7, int(sys.argv[3]), 2
operations = with_tiles_of(comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32))

class Model(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.diffusion_model, self.current_patcher = torch.nn.ModuleList(layers), None

def tensors_of(codec, layout, word):
    if word:
        options = {"per_channel": True} if "INT8" in layout else {} if "MX" in layout else {"scale": "recalculate"}
        weight = QuantizedTensor.from_float(torch.randn(SIZE, SIZE) / 50, layout, **options)
        return {**weight.state_dict("weight"), "comfy_quant": marker({"format": word, "full_precision_matrix_mult": True})}
    rows = SIZE // layout
    tiles = [usual(codec, rows, SIZE, groups=SIZE // 32 if codec in ("w8a16", "u4_groups") else 1, seed=i).at(i * rows)
             for i in range(layout)]
    if codec.startswith("svdq"):  # as its files are, with a branch of its own
        tiles = [tile.having(down=torch.randn(SIZE, RANK) / 50, up=torch.randn(rows, RANK) / 50) for tile in tiles]
    return join(tiles, ["layer"] * layout, (SIZE, SIZE)).tensors

def patcher_of(layers):
    made = []
    for rows, columns, tensors in layers:
        layer = operations.Linear(columns, rows, bias=False, device="cpu", dtype=torch.float32)
        layer.load_state_dict(dict(tensors), strict=False, assign=True)
        made.append(layer)
    patcher = comfy.model_patcher.ModelPatcher(Model(made).eval().requires_grad_(False), *[torch.device("cpu")] * 2)
    loading.attach(patcher)
    return patcher

def with_lora(patcher, pairs):
    clone, names = patcher.clone(), {f"l{i}": f"diffusion_model.{i}.weight" for i in range(len(pairs))}
    file = {f"l{i}.{key}.weight": tensor for i, pair in enumerate(pairs)
            for key, tensor in zip(("lora_up", "lora_down"), pair)}
    assert len(clone.add_patches(comfy.lora.load_lora(file, names))) == len(pairs)
    return clone

def clock(what, *args, **options):
    start = time.process_time()
    what(*args, **options)
    return time.process_time() - start

def pair(rows, columns):
    return (torch.randn(rows, RANK) / 100).bfloat16(), (torch.randn(RANK, columns) / 100).bfloat16()

def load(patcher, rows, low=0):
    rows.append(clock(patcher.patch_model, patcher.load_device, lowvram_model_memory=low))

out, x = {}, torch.randn(TOKENS, SIZE)
for name, how in json.loads(sys.argv[1]).items():
    patcher = patcher_of(COUNT * [(SIZE, SIZE, tensors_of(*how))])
    pairs = [[pair(SIZE, SIZE) for _ in range(COUNT)] for _ in range(3)]
    one = with_lora(patcher, pairs[0])
    three, (up, down) = with_lora(with_lora(one, pairs[1]), pairs[2]), pairs[0][0]
    wide = up.float(), down.float()

    def forward():
        with torch.inference_mode():
            for layer in patcher.model.diffusion_model:
                layer(x)

    def delta():
        for _ in range(COUNT):
            up.float() @ down.float()

    def thin():
        for _ in range(COUNT):
            (x @ wide[1].t()) @ wide[0].t()

    rows = {}
    for i in range(TIMES + 1):
        for key, what in (("delta", delta), ("thin", thin)):
            rows.setdefault(key, []).append(clock(what))
        for key, patched, low in (("bare", patcher, 0), ("one", one, 0), ("three", three, 0), ("low", one, 1)):
            load(patched, rows.setdefault(key, []), low)
            rows.setdefault(f"{key} forward", []).append(clock(forward))
            rows.setdefault(f"{key} off", []).append(clock(patched.unpatch_model, patched.offload_device))
    def ratio(key, *over, of=1):  # of what was measured one after the other
        return median(spent / sum(rest) / of for spent, *rest in list(zip(*(rows[name] for name in (key, *over))))[1:])

    without = ("bare forward", "thin")
    out[name] = {"apply": ratio("one", "delta"), "three": ratio("three", "delta", of=3), "off": ratio("one off", "delta"),
                 "forward": ratio("one forward", *without), "low": ratio("low forward", *without)}

def many(shapes, of):  # one patcher for each of `of`, with a LoRA for every layer
    known = {shape: pair(*shape) for shape in set(shapes)}
    return [with_lora(patcher_of([(*shape, tensors) for shape, tensors in zip(shapes, map(layer, shapes))]),
                      [known[shape] for shape in shapes]) for layer in of]

def fp8(shape):
    return {"weight": codes[:shape[0] * shape[1]].view(shape), "weight_scale": torch.tensor(0.01),
            "comfy_quant": marker({"format": "float8_e4m3fn"})}

shapes = [tuple(shape) for shape in json.loads(sys.argv[2])]
codes = torch.zeros(max(rows * columns for rows, columns in shapes), dtype=torch.uint8).view(torch.float8_e4m3fn)
flux, = many(shapes, [fp8])
small = many([(64, 64)] * len(shapes), [fp8, lambda shape: {"weight": torch.zeros(shape)}])
times, copies, own = [], [], []
for _ in range(3):
    load(flux, times)
    flux.unpatch_model(flux.offload_device)
    copies.append(clock(lambda: [codes[:rows * columns].clone().numel() for rows, columns in shapes]))
for _ in range(TIMES):
    spent = []
    for patched in small:
        load(patched, spent)
        patched.unpatch_model(patched.offload_device)
    own.append(spent)
print(json.dumps({"formats": out, "flux": median(times), "copy": median(copies), "layers": len(shapes),
                  "small": median(ours / plain for ours, plain in own), "alone": median(ours for ours, _ in own)}))
"""


def layers(budget: Callable[[str, float, float, str], None]) -> None:
    """A LoRA on layers of every format, in a fresh process."""
    print(f"a LoRA of rank {RANK} on Linears of 3072 x 3072 on a CPU, over up @ down alone; a forward of 64 tokens over "
          "one without it and the two thin products (processor time)")
    done = subprocess.run([sys.executable, "-c", LAYERS, json.dumps(FORMATS), json.dumps(FLUX), str(RANK)],
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "PACK": str(PACK), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {'':12}{'apply':>9}{'of three':>9}{'take off':>9}{'forward':>9}{'low VRAM':>9}")
    for name, row in found["formats"].items():
        print(f"  {name:12}" + "".join(f"{row[key]:8.2f}x" for key in ("apply", "three", "off", "forward", "low")))
    for name, row in found["formats"].items():
        budget(f"{name}: applying a LoRA over its product", row["apply"], 3, "x")
        budget(f"{name}: a forward with it", row["forward"], 1.25, "x")
    print(f"  FLUX.1, {found['layers']} layers in FP8: {found['flux']:.1f} s, of which {found['copy']:.1f} s are ComfyUI's copies "
          f"of weights; as many tiny layers {found['alone']:.2f} s")
    budget("as many tiny layers: applying over the same to plain ones", found["small"], 4, "x")


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

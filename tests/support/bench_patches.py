"""What a LoRA on quantized weights costs, beside stock ComfyUI and beside its own arithmetic: to apply, each step, and
in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.bench import Row, spent
from support.synthetic import fp8_flux_twins

RANK = 32
LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0")
TITLE = f"a LoRA of rank {RANK} on {len(LAYERS)} FP8 layers of FLUX.1's shapes, fully loaded"

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


def cases(folder: Path) -> list[tuple[Path, Path]]:
    return [fp8_flux_twins(folder, double=1, single=1)]


def measure(folder: str, file: str) -> list[Row]:
    import comfy.model_management
    import comfy.sd
    import torch

    from quantized_transformers.loaders import model

    def fully(patcher: Any) -> None:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)

    def lora_for(net: Any) -> dict[str, Any]:
        g, lora = torch.Generator().manual_seed(0), {}
        for name in LAYERS:
            module = net.get_submodule(name)
            if not getattr(module.weight, "_layout_cls", ""):
                raise RuntimeError(f"{name} is not quantized")
            lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(module.out_features, RANK, generator=g) / 100
            lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(RANK, module.in_features, generator=g) / 100
        return {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}

    plain = {"ours": model.load(model.Request(folder), quiet=True).patcher, "stock": comfy.sd.load_diffusion_model(file)}
    loras = {who: lora_for(patcher.model.diffusion_model) for who, patcher in plain.items()}
    patched = {who: comfy.sd.load_lora_for_models(patcher, None, loras[who], 1.0, 0.0)[0] for who, patcher in plain.items()}
    def without(name: str) -> None:
        for patcher in plain.values():
            fully(patcher)

    def applying(who: str) -> Callable[[], None]:
        return lambda: fully(patched[who])

    def deltas() -> None:
        factors = [tensor.float() for tensor in loras["ours"].values()]
        for up, down in zip(factors[::2], factors[1::2], strict=True):
            up @ down

    took = spent({**{who: applying(who) for who in patched}, "deltas": deltas}, 2, without)
    rows = [Row("applying, over the products of its factors", took["ours"] / took["deltas"], 3,
                {"stock": took["stock"] / took["deltas"]})]

    net = plain["ours"].model.diffusion_model
    module = net.get_submodule(LAYERS[0])
    fully(patched["ours"])
    held = module.held
    x = torch.randn(1024, module.in_features).to(module.weight.dtype)  # tokens of 512 x 512

    def step(factors: Any) -> Callable[[], None]:
        def forward() -> None:
            module.held = factors
            module(x)
        return forward

    with torch.inference_mode():
        took = spent({"with": step(held), "without": step(None)}, 5)
    module.held = held
    elements = sum(one.elements for m in net.modules() if getattr(m, "held", None) for one in m.held.factors)
    return [*rows, Row("a layer with it, over the layer without", took["with"] / took["without"], 1.1),
            Row("memory beside the weights, over the LoRA's", elements / sum(t.numel() for t in loras["ours"].values()), 1)]

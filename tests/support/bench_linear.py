"""What a quantized Linear costs on a CPU beside a plain one, and decoding beside a copy: one thread, processor time,
arms interleaved, medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median

from support.pack import PACK

# format -> (its codec, forward over plain at most, decoding over a copy at most, whether it is the host's layout)
FORMATS = {"FP8": ("fp8", 1.5, 3, "TensorCoreFP8E4M3Layout"), "NVFP4": ("nvfp4", 1.7, 4, "TensorCoreNVFP4Layout"),
           "MXFP8": ("w8a8_mxfp8", 1.5, 3, "TensorCoreMXFP8Layout"), "INT8 W8A16": ("w8a16", 1.5, 3, ""),
           "INT8 W8A8, F32 sums": ("w8a8_dynamic", 1.5, None, ""), "INT8 of ComfyUI": ("w8a8_dynamic", 1.5, None, "TensorWiseINT8Layout"),
           "SVDQ INT4": ("svdq_int4", 1.7, 4, ""), "FP8 rows": ("fp8_blocks", None, 3, ""),
           "UINT4 groups": ("u4_groups", None, 4, ""), "NF4": ("codebook", None, 4, ""), "MXFP4": ("w4a4_mxfp4", None, 4, ""),
           "GPTQ": ("u4_gptq", None, 4, ""), "AWQ": ("u4_awq", None, 4, ""), "GGUF Q8_0": ("ggml_q8_0", None, 3, ""),
           "GGUF Q4_0": ("ggml_q4_0", None, 4, ""), "GGUF Q4_K": ("ggml_q4_k", None, 4, ""), "GGUF Q5_K": ("ggml_q5_k", None, 5, ""),
           "GGUF Q6_K": ("ggml_q6_k", None, 5, ""), "GGUF IQ4_XS": ("ggml_iq4_xs", None, 5, "")}
ROUNDS = 3
SCRIPT = r"""
import json, os, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.ops, torch
from comfy_kitchen.tensor import QuantizedTensor
from statistics import median
from quantized_transformers.quant.codecs import codec
from quantized_transformers.quant.kernels import by_tiles, int8, kernel
from quantized_transformers.quant.kernels.base import DEQUANTIZE, Activation
from quantized_transformers.quant.linear import with_tiles_of
from quantized_transformers.quant.marker import marker
from support.anon import Peak
from support.tiles import usual
torch.set_num_threads(1)
SIZE, TOKENS, TIMES = 3072, 64, 7
takes = by_tiles.takes
has_instructions = int8.has_instructions
host = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=["float8_e4m3fn", "nvfp4", "mxfp8"])
ours = with_tiles_of(host)
x, plain = torch.randn(TOKENS, SIZE), torch.randn(SIZE, SIZE)
src, dst, rows = torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE), torch.empty(256, SIZE)

def layer(ops, tensors, rows=SIZE):
    made = ops.Linear(SIZE, rows, bias=False)
    made.load_state_dict(dict(tensors), strict=False, assign=True)
    return made

def spent(*arms):
    found = [[] for _ in arms]
    for i in range(TIMES + 1):
        for at, arm in enumerate(arms):
            start = time.process_time()
            arm()
            found[at].append(time.process_time() - start)
    return [median(times[1:]) for times in found]

def whole(forward):
    def run():
        by_tiles.takes = lambda x: False
        forward()
        by_tiles.takes = takes
    return run

def with_instructions(forward):
    def run():
        int8.has_instructions = lambda: True
        forward()
        int8.has_instructions = lambda: False
    return run

out = {}
with torch.inference_mode():
    tile = usual("nvfp4", 4 * SIZE, SIZE)
    DEQUANTIZE.linear(Activation(x[:, :128]), usual("fp8", 64, 128), None)  # what torch's first product takes
    with Peak() as peak:
        made = DEQUANTIZE.linear(Activation(x), tile, None)
    out["memory"] = peak.more - made.nbytes
    for name, (word, _, _, layout) in json.loads(sys.argv[1]).items():
        kind = codec(word)
        integers = word == "w8a8_dynamic"
        int8.has_instructions = (lambda: False) if integers and not layout else has_instructions
        tile = usual(word, SIZE, SIZE, groups=1 if integers else SIZE // 32)
        if layout:
            options = {"per_channel": True} if integers else {} if "MX" in layout else {"scale": "recalculate"}
            weight = QuantizedTensor.from_float(torch.randn(SIZE, SIZE) / 50, layout, **options)
            tensors = {**weight.state_dict("weight"), "comfy_quant": marker({"format": kind.word})}
            mine, theirs = layer(ours, tensors), layer(host, tensors)
            tile = kind.of_host(mine.weight, None)
            forward, before = lambda: mine(x), lambda: theirs(x)
        elif integers:
            forward = lambda: kernel("comfy_kitchen").linear(Activation(x), tile, None)
            before = with_instructions(forward)
        else:
            forward = lambda: DEQUANTIZE.linear(Activation(x), tile, None)
            before = whole(forward)
        def decode():
            for first in range(0, SIZE, 256):
                kind.decode_rows(tile, first, first + 256, rows)
        dense, new, old, decoded, copied = spent(lambda: torch.nn.functional.linear(x, plain), forward, before, decode,
                                                 lambda: dst.copy_(src))
        out[name] = {"forward": new / dense, "before": old / dense, "decode": decoded / copied}

print(json.dumps(out))
"""


def linears(budget: Callable[..., None]) -> None:
    print("one Linear of 3072 x 3072 at 64 tokens on a CPU, over a plain one; decoding over a copy (processor time)")
    found = []
    for _ in range(ROUNDS):
        done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(FORMATS)], capture_output=True, text=True, check=True,
                              env={**os.environ, "PACK": str(PACK), "OMP_NUM_THREADS": "1"})
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"  {'':20}{'forward':>9}{'before':>9}{'decode':>9}   before: ComfyUI's own, the weight whole, or torch._int_mm")
    for name in FORMATS:
        print(f"  {name:20}" + "".join(f"{median(one[name][key] for one in found):8.2f}x" for key in ("forward", "before", "decode")))
    for name, (_, forward, decode, _) in FORMATS.items():
        if forward:
            budget(f"{name}: forward over plain", median(one[name]["forward"] for one in found), forward, "x")
        if decode:
            budget(f"{name}: decode over a copy", median(one[name]["decode"] for one in found), decode, "x")
    budget("memory beside a layer of 12288 x 3072", median(one["memory"] for one in found) / 1e6, 16, "MB")

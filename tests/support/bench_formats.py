"""What a load of packed files costs: GGUF, and integers in words (GPTQ, AWQ, compressed-tensors), against reading the
same bytes once and what ComfyUI itself does with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from support.pack import PACK
from support.synthetic import flux_modules

GROUP = 128
TOOLS = ("gptq", "awq", "compressed-tensors")
LIMIT = 1.1
# Every byte into fresh memory ("read"), or a load, of which what ComfyUI's own loader takes is timed apart ("host").
# `anon` is the most anonymous memory beyond what there is before, `kept` what the load leaves there.
SCRIPT = r"""
import gc, json, os, resource, sys, time
sys.path.insert(0, os.path.join(os.environ["PACK"], "tests"))
from support.pack import start_comfy
start_comfy()
import comfy.sd, comfy.text_encoders.flux, torch
from support.anon import Peak, anon
from quantized_transformers import host
from quantized_transformers.loaders import model
from quantized_transformers.loaders.components import text_encoder
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.locate import locate
import quantized_transformers.quant.kernels.choose, quantized_transformers.quant.linear
how, path, base = sys.argv[1:4]
torch.set_num_threads(1)

checkpoint = Checkpoint(locate(path))
stored = {name: t.nbytes for name, t in checkpoint.load_tensors().items()}

def cpu():
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_utime + usage.ru_stime

spent = {"host": 0.0}
def timed(name):
    function = getattr(host, name)
    def wrapped(*args, **kwargs):
        start = cpu()
        try:
            return function(*args, **kwargs)
        finally:
            spent["host"] += cpu() - start
    setattr(host, name, wrapped)
for name in ("load_state_dict", "load_text_encoders"):
    timed(name)

def once():
    if how == "read":
        return [tensor.clone() for tensor in Checkpoint(locate(path)).load_tensors().values()]
    if base:
        return text_encoder.load(text_encoder.Request(base, overrides=(path,))).clip.patcher
    return model.rebuild(model.Request(path))

once()  # imports what a first load imports
gc.collect()
spent["host"] = 0.0
with Peak() as peak:
    start, used = time.perf_counter(), cpu()
    made = once()
    seconds, used = time.perf_counter() - start, cpu() - used
out = {"seconds": seconds, "cpu": used, "anon": peak.more, "kept": anon() - peak.before, "stored": sum(stored.values()),
       "largest": max(stored.values()), **spent}
if how != "read":
    out["size"] = made.model_size()
print(json.dumps(out))
"""


def _gguf(path: Path, double: int, single: int, hidden: int = 3072) -> int:
    """A FLUX.1 in Q4_K under its own names, blocks of any bytes; how many tensors that are."""
    import numpy as np
    import torch

    from support.gguf_files import write

    tensors: dict[str, Any] = {}
    for module in flux_modules(double, single, hidden, "native"):
        name, rows = module.stored[0], sum(module.rows)
        if module.linear and module.inner[0] % 256 == 0:
            size = (rows, module.inner[0] // 256 * 144)
            tensors[f"{name}.weight"] = np.random.default_rng(0).integers(0, 99, size, dtype=np.uint8), "Q4_K"
        else:
            tensors[f"{name}.{module.stored_leaf}"] = torch.zeros(rows, *module.inner)
        if module.bias:
            tensors[f"{name}.bias"] = torch.zeros(rows)
    write(path, tensors)
    return len(tensors)


def _packed(folder: Path, tool: str, double: int, single: int) -> Path:
    """A FLUX.1 in groups of 128 under diffusers' names, with random codes of 4 bits."""
    import torch
    from safetensors.torch import save_file

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-1 << 31, 1 << 31, shape, dtype=torch.int64).to(torch.int32)

    tensors: dict[str, torch.Tensor] = {}
    for module in flux_modules(double, single, 3072):
        for name, rows in zip(module.stored, module.rows, strict=True):
            shape = (rows, *module.inner)
            if not module.linear or shape[1] % GROUP:
                tensors[f"{name}.{module.stored_leaf}"] = torch.zeros(shape, dtype=torch.bfloat16)
            elif tool == "compressed-tensors":
                tensors |= {f"{name}.weight_packed": words(rows, shape[1] // 8), f"{name}.weight_shape": torch.tensor(shape),
                            f"{name}.weight_scale": torch.ones(rows, shape[1] // GROUP, dtype=torch.bfloat16)}
            else:
                across = {"gptq": (shape[1] // 8, rows), "awq": (shape[1], rows // 8)}[tool]
                tensors |= {f"{name}.qweight": words(*across), f"{name}.qzeros": words(shape[1] // GROUP, rows // 8),
                            f"{name}.scales": torch.ones(shape[1] // GROUP, rows, dtype=torch.float16)}
                if tool == "gptq":
                    tensors[f"{name}.g_idx"] = (torch.arange(shape[1]) // GROUP).to(torch.int32)
            if module.bias:
                tensors[f"{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
    config = {"gptq": {"quant_method": "gptq", "bits": 4}, "awq": {"quant_method": "awq", "version": "gemm"},
              "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups":
                                     {"group_0": {"targets": ["Linear"], "weights": weights}}}}[tool]
    folder.mkdir()
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    return folder


def _t5(folder: Path, layers: int) -> tuple[Path, Path]:
    """(a FLUX.1 base whose T5 has T5-XXL's widths and fewer layers, and no weights; that T5 as a GGUF in Q4_0)."""
    import numpy as np
    import torch

    from support import text_encoders
    from support.gguf_files import write

    base = text_encoders.base("flux1", folder / "base")
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": layers}
    config = base / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **sizes}), encoding="utf-8")
    for file in (base / "text_encoder_2").glob("*.safetensors"):
        file.unlink()
    rng = np.random.default_rng(0)

    def q4(rows: int, columns: int) -> Any:
        return rng.integers(0, 99, (rows, columns // 32 * 18), dtype=np.uint8), "Q4_0"

    tensors: dict[str, Any] = {"token_embd.weight": q4(32128, 4096), "enc.output_norm.weight": torch.ones(4096)}
    for i in range(layers):
        block = f"enc.blk.{i}"
        tensors |= {f"{block}.attn_{part}.weight": q4(4096, 4096) for part in "qkvo"}
        tensors |= {f"{block}.ffn_gate.weight": q4(10240, 4096), f"{block}.ffn_up.weight": q4(10240, 4096),
                    f"{block}.ffn_down.weight": q4(4096, 10240), f"{block}.attn_norm.weight": torch.ones(4096),
                    f"{block}.ffn_norm.weight": torch.ones(4096)}
    tensors["enc.blk.0.attn_rel_b.weight"] = torch.zeros(32, 64)
    return base, write(folder / "t5.gguf", tensors, "t5encoder")


def _run(how: str, path: Path, base: Path | str = "") -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how, str(path), str(base)], capture_output=True, text=True,
                          env={**os.environ, "PACK": str(PACK)}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def describing(folder: Path, budget: Callable[..., None]) -> None:
    """Inspect of a GGUF of 1,000 tensors."""
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate

    path, times = folder / "1000.gguf", []
    count = _gguf(path, 24, 49, 256)
    for _ in range(15):
        start = perf_counter()
        describe(Checkpoint(locate(str(path))))
        times.append((perf_counter() - start) * 1e3)
    budget(f"GGUF of {count} tensors, median of 15", median(times), 10, "ms")
    path.unlink()


def loading(folder: Path, budget: Callable[..., None], rounds: int = 5) -> None:
    """Loads of packed transformers and a text encoder against their bytes read once and ComfyUI's part of the load."""
    print("loading packed files, processor time of one thread: against a copy of every byte into fresh memory, and "
          "ComfyUI's own part of the load")
    _gguf(folder / "flux.gguf", 2, 4)
    made: list[tuple[str, Path, Path | str]] = [("GGUF", folder / "flux.gguf", "")]
    made += [(tool, _packed(folder / tool, tool, 2, 4), "") for tool in TOOLS]
    base, t5 = _t5(folder, 3)
    made.append(("GGUF T5", t5, base))
    for name, path, beside in made:
        rows: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
        for i in range(rounds):
            for how in ("read", "load") if i % 2 else ("load", "read"):
                rows[how].append(_run(how, path, beside))
        read, load = ({key: median(row[key] for row in found) for key in found[0]} for found in rows.values())
        print(f"  {name:18}  {load['cpu']:.3f} s, of which ComfyUI {load['host']:.3f} (wall {load['seconds']:.3f}); reading "
              f"{read['stored'] / 1e9:.2f} GB {read['cpu']:.3f} s; anonymous memory up to {load['anon'] / 1e6:.0f} MB; "
              f"the file {load['stored'] / 1e6:.0f} MB, the model's size {load['size'] / 1e6:.0f} MB")
        budget(f"{name}: load, ratio of medians of {rounds}", load["cpu"] / (read["cpu"] + load["host"]), LIMIT, "x")
        budget(f"{name}: memory beyond what is kept (largest tensor: {load['largest'] / 1e6:.0f} MB)",
               (load["anon"] - load["kept"]) / 1e6, 1.05 * load["largest"] / 1e6, "MB")
        if beside:
            budget(f"{name}: what the patcher counts, of the file's bytes", load["size"] / load["stored"], 1.05, "x")

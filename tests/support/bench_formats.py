"""What a load of packed files costs: GGUF, and integers in words (GPTQ, AWQ, compressed-tensors)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from support.bench import FRESH_MEMORY, Row, spent
from support.synthetic import flux_modules

TITLE = "loading packed files, over reading every byte into fresh memory once and ComfyUI's own part of the load"
LINUX = True
ENVIRONMENT = FRESH_MEMORY
GROUP = 128
TOOLS = ("gptq", "awq", "compressed-tensors")
LIMIT = 1.1
def gguf_flux(path: Path, double: int, single: int, hidden: int = 3072) -> int:
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


def cases(folder: Path) -> list[tuple[str, Path, Path | str]]:
    """(what, its file, for a text encoder the base that it is loaded into)."""
    gguf_flux(folder / "flux.gguf", 2, 4)
    base, t5 = _t5(folder, 3)
    return [("GGUF", folder / "flux.gguf", ""), *((tool, _packed(folder / tool, tool, 2, 4), "") for tool in TOOLS),
            ("GGUF T5", t5, base)]


def measure(name: str, path: str, base: str) -> list[Row]:
    import gc

    import comfy.sd  # noqa: F401  # ComfyUI's own imports are no part of a load
    import comfy.text_encoders.flux  # noqa: F401

    import quantized_transformers.quant.kernels.choose
    import quantized_transformers.quant.linear  # noqa: F401
    from quantized_transformers import host
    from quantized_transformers.loaders import model
    from quantized_transformers.loaders.components import text_encoder
    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.locate import locate
    from support.anon import Peak, anon

    stored = [tensor.nbytes for tensor in Checkpoint(locate(path)).load_tensors().values()]
    of_host: list[float] = []  # what ComfyUI's own loader takes, of each load

    def timed(name: str) -> None:
        function = getattr(host, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = process_time()
            try:
                return function(*args, **kwargs)
            finally:
                of_host[-1] += process_time() - start

        setattr(host, name, wrapped)

    for function in ("load_state_dict", "load_text_encoders"):
        timed(function)

    def load() -> Any:
        of_host.append(0.0)
        if base:
            return text_encoder.load(text_encoder.Request(base, overrides=(path,))).clip.patcher
        return model.rebuild(model.Request(path))

    def read() -> Any:
        return [tensor.clone() for tensor in Checkpoint(locate(path)).load_tensors().values()]

    took = spent({"load": load, "read": read}, 2)
    gc.collect()
    with Peak() as peak:
        made = load()
    rows = [Row(f"{name}: load", took["load"] / (took["read"] + median(of_host[1:])), LIMIT),
            Row(f"{name}: memory beyond what is kept, over the largest tensor", (peak.more - (anon() - peak.before)) / max(stored),
                1.05)]
    if base:
        rows.append(Row(f"{name}: what the patcher counts, over the file's bytes", made.model_size() / sum(stored), 1.05))
    return rows

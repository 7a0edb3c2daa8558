"""Stage 7: an FP8 file of FLUX.1's size from disk to the GPU, by ComfyUI alone and by this pack."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from . import layers
from .machine import Where, let_go
from .models import build, step
from .rows import Rows

LIMIT = 420


def run(rows: Rows, where: Where) -> None:
    with tempfile.TemporaryDirectory(prefix="qt-gpu-") as temp:
        path = Path(temp) / "flux1-fp8.safetensors"
        rows.measure("write the file", lambda: _write(path, where))
        for name, load in (("ComfyUI alone", _stock), ("this pack", _ours)):
            rows.measure(f"load, {name}", lambda load=load: _load(load, path, where))


def _write(path: Path, where: Where) -> dict[str, Any]:
    from safetensors.torch import save_file

    tensors = dict(build("FLUX.1", layers.Arm("fp8"), where).model.diffusion_model.state_dict())
    start = perf_counter()  # layers of one shape share memory here, and safetensors wants tensors of their own
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path))
    return {"bytes": path.stat().st_size, "seconds": perf_counter() - start}


def _stock(path: Path) -> Any:
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path))


def _ours(path: Path) -> Any:
    from quantized_transformers.loaders.model import Request, load

    return load(Request(str(path))).patcher


def _load(load: Any, path: Path, where: Where) -> dict[str, Any]:
    import comfy.model_management

    try:
        start = perf_counter()
        patcher = load(path)
        loaded = perf_counter() - start
        comfy.model_management.load_models_gpu([patcher])
        where.wait()
        there = perf_counter() - start - loaded
        return {"load": loaded, "to_device": there, "bytes": path.stat().st_size, **step(patcher, where)}
    finally:
        let_go()

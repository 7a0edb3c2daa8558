"""Stage 10: a trained checkpoint through the nodes that users have: the committed miniature in F32, in BF16 and, built
from it, in FP8 as an override; sampled from the same noise and decoded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .machine import Where, let_go
from .rows import Rows

LIMIT = 240
# PSNR of the latents against those of F32 in dB: BF16's rounding, and FP8's (tests/demo.py derives the latter).
BOUNDS = {"bf16": 35.0, "fp8": 25.0}


def run(rows: Rows, where: Where) -> None:
    with tempfile.TemporaryDirectory(prefix="qt-gpu-") as temp:
        override, drawn = Path(temp) / "miniature-fp8", dict[str, torch.Tensor]()
        rows.measure("build", lambda: _build(override))
        for name, load in (("fp32", lambda: _base("fp32")), ("bf16", lambda: _base("bf16")),
                           ("fp8", lambda: _override(override))):
            rows.measure(name, lambda name=name, load=load: _draw(name, load, drawn))


def _miniature() -> Path:
    from support.miniature import FOLDER

    return FOLDER


def _build(override: Path) -> dict[str, Any]:
    from quantized_transformers.nodes.build_quantized import QT_BuildFP8Transformer

    QT_BuildFP8Transformer.execute(modelopt_export="", backbone="", base=str(_miniature() / "transformer"), output=str(override))
    return {"bytes": sum(file.stat().st_size for file in override.glob("*.safetensors"))}


def _base(dtype: str, weights: str = "load") -> Any:
    from quantized_transformers.nodes.load_base import QT_LoadBaseModel

    return QT_LoadBaseModel.execute("", weights=weights, reference=str(_miniature()), dtype=dtype).args[0]


def _override(folder: Path) -> Any:
    from quantized_transformers.nodes.apply_override import QT_ApplyTransformerOverride

    return QT_ApplyTransformerOverride.execute(_base("bf16", "defer to override"), "", reference=str(folder)).args[0]


def _draw(name: str, load: Callable[[], Any], drawn: dict[str, torch.Tensor]) -> dict[str, Any]:
    import nodes as of_host
    from quantized_transformers.makers.bench.measure import random_conditioning, random_latent
    from quantized_transformers.nodes.load_parts import QT_LoadBaseVAE
    from support.miniature import SIZE, STEPS, psnr

    try:
        model = load()
        said = random_conditioning(model)
        latents, = of_host.KSampler().sample(model, 7, STEPS, 1.0, "euler", "simple", said, said,
                                             random_latent(model, SIZE, SIZE))
        vae = QT_LoadBaseVAE.execute("", reference=str(_miniature())).args[0]
        picture, = of_host.VAEDecode().decode(vae, latents)
        drawn[name] = latents["samples"].float().cpu()
    finally:
        let_go()
    found = {"picture": list(picture.shape), "finite": bool(torch.isfinite(picture).all())}
    if name not in BOUNDS:
        return {**found, "ok": found["finite"]}
    exact = drawn["fp32"]
    ratio = psnr(exact, drawn[name], float(exact.max() - exact.min()))
    return {**found, "psnr": ratio, "bound": BOUNDS[name], "ok": found["finite"] and ratio >= BOUNDS[name]}

"""Servers of SGLang as `serve --run` starts them, and what they must draw: the same by diffusers, from the same noise."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from support import miniature, sglang
from support.pack import PACK

SIZE = miniature.SIZE
# What a client sends for a picture of the miniature, in SGLang's names.
DRAWN: dict[str, Any] = {"prompt": "a cat", "size": f"{SIZE}x{SIZE}", "num_inference_steps": miniature.STEPS,
                         "guidance_scale": 1.0, "generator_device": "cpu", "output_format": "png"}
RANK = 4


def by_serve(folder: Path, port: int, base: Path, *more: str) -> sglang.Server:
    """A server in `folder`, as a user starts it on a CPU: `python <pack> serve BASE ... --run`. Idle, SGLang's workers keep a
    core busy, unless they are told to sleep; several ranks do all the same."""
    return sglang.Server(folder, port, [sys.executable, str(PACK), "serve", str(base), *more, "--port", str(port), "--sglang",
                                        str(sglang.program("sglang")), "--run", "--", "--warmup-mode", "off",
                                        "--sleep-on-idle"])


def pixels(picture: Any) -> numpy.ndarray:
    """float [H, W, 3] in 0..255 of a picture's file."""
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=numpy.float32)


def by_diffusers(base: Path, seed: int, transformer: Any = None, prompt: str = "a cat") -> numpy.ndarray:
    """float [H, W, 3] in 0..255: what DRAWN means to diffusers' FluxPipeline in BF16, from SGLang's noise: BF16 of the CPU's
    generator."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(base, torch_dtype=torch.bfloat16,
                                            **({"transformer": transformer} if transformer is not None else {}))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, SIZE // 8, SIZE // 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(seed))
    packed = noise.view(1, 16, SIZE // 16, 2, SIZE // 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 64)
    made = pipeline(prompt, height=SIZE, width=SIZE, num_inference_steps=miniature.STEPS, guidance_scale=1.0, latents=packed,
                    output_type="np").images[0]
    return numpy.asarray(made * 255, dtype=numpy.float32).round()


def another(base: Path, folder: Path) -> Path:
    """A BF16 transformer that is another than the base's: an override that a CPU runs."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base / "transformer", folder)
    file, = folder.glob("*.safetensors")
    save_file({name: tensor + 0.15 * tensor.abs().mean() * torch.sign(tensor) for name, tensor in load_file(file).items()}, str(file))
    return folder


def lora(base: Path, file: Path, seed: int) -> Path:
    """A LoRA of the miniature's attention and feed-forward in diffusers' names, by which SGLang and ComfyUI know it."""
    from safetensors.torch import load_file, save_file

    g, tensors = torch.Generator().manual_seed(seed), {}
    stored, = (base / "transformer").glob("*.safetensors")
    for name, weight in sorted(load_file(stored).items()):
        if name.endswith(".weight") and (".attn.to_" in name or ".ff" in name) and weight.ndim == 2:
            rows, columns = weight.shape
            name = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=g) * columns ** -0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) * 0.4
    save_file(tensors, str(file))
    return file


def with_loras(base: Path, *loras: tuple[Path, float], dtype: torch.dtype = torch.bfloat16) -> Any:
    """diffusers' transformer of the base with these merged by their definition, W + strength * B A; in BF16 as SGLang does."""
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file

    model = FluxTransformer2DModel.from_pretrained(base / "transformer", torch_dtype=dtype)
    with torch.no_grad():
        for file, strength in loras:
            tensors = load_file(file)
            for name in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
                weight = model.get_parameter(f"{name.removeprefix('transformer.')}.weight")
                change = strength * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
                weight.copy_((weight.float() + change).to(weight.dtype))
    return model

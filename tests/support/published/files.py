"""Safetensors files of cases; runs of zeros become holes."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import torch

from .formats import BF16, E4M3, F16, F32, I8, U8

NAMES = {F32: "F32", F16: "F16", BF16: "BF16", E4M3: "F8_E4M3", U8: "U8", I8: "I8"}
Tensors = dict[str, torch.Tensor]


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, wide elements first; runs of 64 kB of zeros become holes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in order:
        t = tensors[name]
        size = t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for name in order:
            if tensors[name].stride() == (0, 0):  # zeros by expand()
                file.seek(prod(tensors[name].shape) * tensors[name].element_size(), 1)
            elif tensors[name].numel():
                for part in tensors[name].contiguous().reshape(-1).view(U8).split(65536):
                    if len(part) == 65536 and not part.any():
                        file.seek(65536, 1)
                    else:
                        file.write(part.numpy().tobytes())
        file.truncate(start + at)


def text(conf: dict) -> torch.Tensor:
    """A comfy_quant tensor: JSON as bytes."""
    return torch.tensor(list(json.dumps(conf).encode()), dtype=U8)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")

"""Run by SGLang's own Python, alone: what is installed there, as JSON behind "QT" (installed.py)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from typing import Any


def version(package: str) -> str:
    """Empty for what is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_engine() -> bool:
    """Whether the package nunchaku is the SVDQuant engine: PyPI has another of that name."""
    spec = importlib.util.find_spec("nunchaku")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any(os.path.isfile(os.path.join(folder, "models", "linear.py")) for folder in folders)


def gpus() -> list[tuple[str, tuple[int, int], int]]:
    """(name, compute capability, bytes) of each card that torch sees."""
    try:
        import torch

        cards: list[Any] = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:  # a torch that does not import raises anything
        return []
    return [(card.name, (card.major, card.minor), card.total_memory) for card in cards]


if __name__ == "__main__":
    packages = {"sglang": "sglang", "torch": "torch", "flashinfer": "flashinfer-python", "nunchaku": "nunchaku"}
    print("QT" + json.dumps({**{name: version(package) for name, package in packages.items()}, "engine": is_engine(),
                             "npu": importlib.util.find_spec("torch_npu") is not None, "gpus": gpus()}))

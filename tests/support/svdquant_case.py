"""A packed tiny file and the module that runs its family on both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support import svdquant_models as models

FORWARD = 1e-5  # two fp32 implementations of one network; Z-Image's norms have another epsilon in the host (4e-6)


@dataclass(frozen=True)
class Case:
    """A packed file, the module that runs its family on both sides, and some native Linears as rows of diffusers'."""

    made: models.Made
    path: Path
    support: Any
    layers: dict[str, list[str]] = field(default_factory=dict)

    def load(self, **request: Any) -> Any:
        from quantized_transformers.loaders import model

        return model.load(model.Request(str(self.path), **request), quiet=True)

    def run(self, patcher: Any, **kwargs: Any) -> torch.Tensor:
        return self.support.comfy_velocity(patcher, **self.support.inputs(), **kwargs)

    def reference(self, network: Any) -> torch.Tensor:
        return self.support.diffusers_velocity(network, **self.support.inputs())

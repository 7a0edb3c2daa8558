"""The machine that the host runs models on, as one value: everything that the choice of kernels depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import devices
from .check import needs
from .texts import Text

MATMULS = {"FP8": "SM 8.9", "NVFP4": "SM 10.0", "MXFP8": "SM 10.0", "INT8": ""}  # and the first GPU that has it


@dataclass(frozen=True)
class Machine:
    """`kind`: the device's type ("cuda", "npu", "mps", ...; "cpu" where the host computes on the CPU), `name` it in
    words. `capability` is CUDA's (None elsewhere), `gfx` AMD's architecture ("gfx1100"). `matmuls`: of MATMULS, those
    that the host multiplies natively. `found`: kernel -> what its `probe` found of what it needs.
    """

    kind: str = "cpu"
    name: str = "cpu"
    capability: tuple[int, int] | None = None
    gfx: str = ""
    matmuls: frozenset[str] = frozenset()
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sm(self) -> str:
        """The CUDA capability in words."""
        return f"SM {self.capability[0]}.{self.capability[1]}" if self.capability else Text("no NVIDIA GPU")


@needs("devices")
def machine() -> Machine:
    """The machine as the host sees it now; without what kernels have to find for themselves."""
    cpu = devices.is_cpu()
    return Machine("cpu" if cpu else devices.device_type(), devices.device_name(),
                   None if cpu else devices.capability(), "" if cpu else devices.amd_architecture(),
                   frozenset(kind for kind in MATMULS if devices.has_matmul(kind)))

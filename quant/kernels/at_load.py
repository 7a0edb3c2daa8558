"""GGUF on an Ascend NPU: dequantized to the compute dtype while it is loaded, as SGLang does it (its page "Quantization
on Ascend", "GGUF on Ascend support"). torch_npu has no operator for ggml's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...host import Machine
from ...host.texts import Text
from ..codecs.ggml import CODECS
from .base import NATIVE, Dequantize, Speed

if TYPE_CHECKING:
    from .base import Kernel


class AtLoad(Dequantize):
    """See the module. `compute: dequantize` keeps the blocks in memory instead."""

    name, title, device = "at_load", "dequantized when loaded", "npu"
    codecs = frozenset(one.name for one in CODECS)
    at_load = full_precision = True

    def runs(self, name: str, machine: Machine) -> str:
        return "" if machine.kind == self.device else Text("ComfyUI does not run models on an Ascend NPU here")

    def speed(self, name: str, machine: Machine) -> Speed:
        return Speed(NATIVE, Text("weights are dequantized to the compute dtype when they are loaded, and take its "
                                  "memory"))

    def quantizes(self, name: str, machine: Machine) -> str:
        return Text("GGUF is dequantized when it is loaded; nothing quantizes its activations")


KERNEL = AtLoad()


def get(variant: str) -> Kernel:
    """The kernel; it has no variants."""
    return KERNEL

"""comfy-kitchen's kernels: its INT8 matmul with an NPU's activation rules; other kinds multiply dequantized.

Layers in the host's own formats do not come here: the host runs them.
"""

from __future__ import annotations

import torch
from comfy_kitchen import mm_int8

from ..kinds import KINDS
from ..layout import AscendLayout
from .reference import Reference


class ComfyKitchen(Reference):
    """See the module."""

    name = "comfy_kitchen"
    takes_host_layouts = False
    matmul = staticmethod(mm_int8)

    def linear(self, x: torch.Tensor, codes: torch.Tensor, params: AscendLayout.Params,
               bias: torch.Tensor | None) -> torch.Tensor:
        """See backends.Backend."""
        if KINDS[params.kind].integer:
            return super().linear(x, codes, params, bias)
        return self.weight_only(x, codes, params, bias)


BACKEND = ComfyKitchen()

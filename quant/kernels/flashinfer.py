"""NVFP4 matmul by FlashInfer's `mm_fp4` instead of comfy-kitchen, on the same bytes.

An FP4 dot product does not change when both operands swap the two codes of every byte, so weights and activations stay
in the host's order (high nibble first, scales in 128 x 4 tiles), which is what the cudnn and cutlass kernels take;
trtllm wants the weight's rows shuffled, which FlashInfer's own functions do (as in SGLang's modelopt_quant.py).

FlashInfer is imported when a layer first multiplies; whether it may be used is decided before, by `choose`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...host.texts import Text
from ..blocks import linear_blocks
from ..tile import Tile
from .base import NATIVE, Activation, Speed, add_low_rank
from .comfy_kitchen import ComfyKitchen, nvfp4_activation

if TYPE_CHECKING:
    from ...host import Machine
    from .base import Kernel
    from .choose import Wanted

VARIABLE = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
# Values that SGLang-Diffusion accepts for the variable, in any case -> mm_fp4's backend.
ACCEPTED = {f"{prefix}{name}": name for name in ("trtllm", "cutlass", "cudnn") for prefix in ("", "flashinfer_")}
ACCEPTED["auto"] = "auto"
MINIMUM = (10, 0)


def choose(wanted: str, capability: tuple[int, int] | None,
           environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """mm_fp4's backend for the node's `fp4_backend`, or None for comfy-kitchen; and a line for the report.

    `capability` is the GPU's (None without one). "auto" takes what the environment variable says, else comfy-kitchen.
    FlashInfer missing or a GPU before SM 10.0 fall back to comfy-kitchen and say so.
    """
    said = environment.get(VARIABLE, "")
    backend = ACCEPTED.get(wanted if wanted != "auto" else said.lower())
    if wanted == "comfy_kitchen" or wanted == "auto" and not said:
        return None, ""
    if backend is None:
        return None, Text("{variable} = {value!r} is none of {names}; comfy-kitchen multiplies NVFP4",
                          variable=VARIABLE, value=said, names=", ".join(sorted(ACCEPTED)))
    asked = Text("FlashInfer ({backend}) was asked for NVFP4", backend=backend)
    if capability is None or capability < MINIMUM:
        have = Text("there is no NVIDIA GPU") if capability is None else \
            Text("this GPU is SM {version}", version=f"{capability[0]}.{capability[1]}")
        return None, Text("{asked}, but it needs SM 10.0 or newer and {have}; NVFP4 is dequantized", asked=asked,
                          have=have)
    if importlib.util.find_spec("flashinfer") is None:
        return None, Text("{asked}, but it is not installed (pip install flashinfer-python); comfy-kitchen multiplies "
                          "NVFP4", asked=asked)
    try:
        from flashinfer import mm_fp4  # noqa: F401
    except Exception as error:  # a broken install raises anything, from ImportError to OSError
        return None, Text("{asked}, but it does not import ({error}); comfy-kitchen multiplies NVFP4", asked=asked,
                          error=error)
    return backend, Text("FlashInfer ({backend}) multiplies NVFP4", backend=backend)


class FlashInfer(ComfyKitchen):
    """NVFP4 multiplied by FlashInfer; sizes its kernels do not take, and other codecs, go to comfy-kitchen."""

    title, by_name, own_layout = "FlashInfer", True, True
    codecs = frozenset({"nvfp4"})

    def __init__(self, backend: str) -> None:
        self.name, self.backend = f"flashinfer:{backend}", backend

    def linear(self, act: Activation, tile: Tile, bias: Tensor | None) -> Tensor:
        trtllm = self.backend == "trtllm"
        rows, half = tile.place.rows, tile.place.columns // 2
        if tile.place.codec != "nvfp4" or half % 32 or rows % (128 if trtllm else 32):
            return super().linear(act, tile, bias)
        from flashinfer import mm_fp4

        x, data, block = nvfp4_activation(act, tile), tile["codes"], tile["block"].view(torch.uint8)
        if trtllm:
            from flashinfer import shuffle_matrix_a, shuffle_matrix_sf_a

            data = shuffle_matrix_a(data, 128)
            linear = linear_blocks(tile["block"], rows, half)
            block = shuffle_matrix_sf_a(linear.view(torch.uint8), 128).reshape(rows, -1)
        dtype = act.x.dtype
        # trtllm writes BF16 only, the others BF16 or FP16
        out_dtype = dtype if dtype == torch.float16 and not trtllm else torch.bfloat16
        alpha = (x._params.scale * tile["scale"]).reshape(1)
        out = mm_fp4(x._qdata, data.t(), x._params.block_scale.view(torch.uint8), block.t(), alpha, out_dtype,
                     backend=self.backend)[:act.x.shape[0]].to(dtype)
        return add_low_rank(out if bias is None else out + bias.to(dtype), act.x, tile)


    def asked(self, wanted: Wanted, names: Collection[str], machine: Machine) -> tuple[str, str]:
        if not self.codecs & set(names):
            useless = wanted.fp4_backend != "auto"
            return "", Text("fp4_backend {value} has no effect, there are no NVFP4 layers",
                            value=wanted.fp4_backend) if useless else ""
        if wanted.compute == "dequantize":
            return "", ""
        backend, note = choose(wanted.fp4_backend, machine.capability)
        return (f"flashinfer:{backend}", "") if backend else ("", note)

    def speed(self, name: str, machine: Machine) -> Speed:
        return Speed(NATIVE, Text("FlashInfer ({backend}) multiplies NVFP4", backend=self.backend))


def get(variant: str) -> Kernel:
    """The kernel with this mm_fp4 backend."""
    return FlashInfer(variant or "auto")

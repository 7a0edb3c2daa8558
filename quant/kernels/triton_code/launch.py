"""A tile times activations by the kernels of products.py. Imports Triton."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear as matmul

from .plan import Plan
from .products import add_up, multiply, store
from .shapes import COLUMNS, ROWS, WARPS, Shape, parts_of

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # a product and a sum are rounded one by one, as in plain torch
ADDED = 256  # columns of a program that adds up parts
KEPT = 1 << 28  # bytes of a decoded weight whose memory is kept for the next one
_scratch = threading.local()


def decoded(plan: Plan, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight [rows, columns], computed in F32 and rounded once; into `out` where there is one."""
    rows, columns = plan.rows, plan.columns
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=plan.codes.device)
    with _on(out.device):
        store[triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)](
            *plan.tensors, out, rows, columns, *plan.strides, *plan.constants, columns % COLUMNS == 0, ROWS,
            COLUMNS, num_warps=WARPS, **OPTIONS)
    return out


def fused(plan: Plan, x: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """x [M, K] times the weight, plus bias, in x's dtype (BF16 or F16), by one kernel, or two where the sum is cut."""
    count, rows, columns = len(x), plan.rows, plan.columns
    parts, steps = parts_of(shape, count, rows, columns, processors(x.device))
    whole = parts == 1
    out = torch.empty(count, rows, dtype=x.dtype, device=x.device)
    made = out if whole else torch.empty(parts, count, rows, dtype=torch.float32, device=x.device)
    with _on(x.device):
        multiply[triton.cdiv(count, shape.m) * triton.cdiv(rows, shape.rows), parts](
            *plan.tensors, x, bias if whole else None, made, count, rows, columns, *plan.strides, x.stride(0),
            *plan.constants, parts * steps * shape.columns == columns, shape.m, shape.rows, shape.columns, steps,
            num_warps=shape.warps, num_stages=shape.stages, **OPTIONS)
        if not whole:
            add_up[count, triton.cdiv(rows, ADDED)](made, bias, out, count, rows, parts, ADDED, num_warps=4, **OPTIONS)
    return out


def through_memory(plan: Plan, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times the weight, plus bias: decoded into memory that is used again, then torch's own product."""
    return matmul(x, decoded(plan, x.dtype, _weight(plan, x)), bias)


def compiled_for(plan: Plan, x: Tensor, bias: Tensor | None, shape: Shape | None) -> tuple[Any, ...]:
    """What tells the kernels apart that these arguments are compiled for: constants, and what Triton makes one of
    itself, which are dtypes, addresses and sizes that are multiples of 16, and sizes of 1."""
    parts = parts_of(shape, len(x), plan.rows, plan.columns, processors(x.device)) if shape else None
    sizes = len(x), plan.rows, plan.columns, x.stride(0), *plan.strides
    tensors = x, bias, *plan.tensors
    return (x.device, shape, parts, *plan.constants, *((size == 1, size % 16 == 0) for size in sizes),
            *(None if one is None else (one.dtype, one.data_ptr() % 16 == 0) for one in tensors))


@cache
def processors(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a CUDA graph, where nothing may wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> Any:
    """Triton launches on torch's current device."""
    return nullcontext() if device.type != "cuda" or device.index == torch.cuda.current_device() else \
        torch.cuda.device(device)


def _weight(plan: Plan, x: Tensor) -> Tensor | None:
    """Memory for a decoded weight: of this thread, device and stream, so that whoever writes into it next comes after
    whoever reads it now. None for large ones, and in a CUDA graph, which needs memory of its own."""
    wanted = plan.rows * plan.columns * x.element_size()
    if wanted > KEPT or capturing(x.device):
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    held = vars(_scratch).setdefault("held", {})
    key = x.device, stream
    if key not in held or held[key].numel() < wanted:
        held.pop(key, None)
        with torch.inference_mode(False):  # no inference tensor, which could be written in that mode only
            held[key] = torch.empty(wanted, dtype=torch.uint8, device=x.device)
    found: Tensor = held[key][:wanted].view(x.dtype).view(plan.rows, plan.columns)
    return found
